"""benchmarks/gpu.py without a GPU: what it would do, its pipeline at toy size, its pages."""

import json
import subprocess
import sys
import types

import gpu
import gpu_calls
import gpu_parts
import gpu_report
import pytest
import torch
from paths import ROOT

from ssmzoo import ops

COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]


def call(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_what_it_would_do_fits_into_eight_minutes():
    found = call("--dry-run").stdout
    assert all(f" {part.name} " in found for part in gpu.PARTS)
    assert sum(part.seconds for part in gpu.PARTS) < 8 * 60
    assert set(gpu.TRAINED) <= {part.name for part in gpu.PARTS if part.section == "train"}
    assert "decode" not in call("--dry-run", "--only", "card").stdout


def test_every_timed_call_runs_and_is_told():
    rows = []
    bench = gpu_parts.Bench("cpu", True, lambda **row: rows.append(row), [])
    assert set(gpu.TIMED) == set(gpu_calls.TIMED)
    for part, what in gpu.TIMED.items():
        bench.times(part)
        assert {call[0].__name__ for call in gpu_calls.TIMED[part]} == set(what.split(", "))
    assert len(rows) == sum(1 + call[-1] for calls in gpu_calls.TIMED.values() for call in calls)
    assert {row["backend"] for row in rows} == {"torch"} and all(row["ms"] > 0 for row in rows)


def test_functions_of_flash_linear_attention_are_called_as_theirs(monkeypatch):
    asked = []

    def theirs(q, k, v, g, beta, scale=None):
        asked.append((g.ndim, scale))
        return v * beta[..., None], None

    for module in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.ops.kda"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = theirs
    sys.modules["fla.ops.kda"].chunk_kda = theirs
    make = gpu_calls.delta_call
    for channels in (False, True):
        call = make("cpu", torch.float32, 1, 4, 3, channels=channels)
        gpu_parts.flash_linear_attention(ops.gated_delta_rule, call, False)()
    assert asked == [(3, 1.0)] * 2 + [(4, 1.0)] * 2
    assert gpu_parts.flash_linear_attention(ops.gated_delta_rule, call, True) is None  # a gradient is missing
    assert gpu_parts.flash_linear_attention(ops.dense_scan, call, False) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so():
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.describe("cuda", False)


def test_a_part_runs_in_a_process_and_is_not_run_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "describe", lambda device, toy: "this machine")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--toy", "--only", "card", "--out", str(tmp_path)])
    gpu.main()
    assert "card card: ended well" in capsys.readouterr().out
    assert "copy_gb_s" in (tmp_path / "gpu_card.csv").read_text() and "## The card" in (tmp_path / "gpu.md").read_text()
    gpu.main()
    assert "card card: there already" in capsys.readouterr().out


def test_half_lines_limits_and_wrong_results(tmp_path, monkeypatch, capsys):
    args = type("Args", (), dict(out=tmp_path, device="cpu", toy=True))
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "gpu_parts.py").write_text("import time; time.sleep(60)")
    part = gpu.PARTS[0]
    assert gpu.run(part, args, "m", 0.5) == "at its limit of 0 s"
    (tmp_path / "gpu_parts.py").write_text("raise SystemExit(3)")
    assert gpu.run(part, args, "m", 20) == "badly, with status 3"
    file = tmp_path / "gpu.jsonl"
    with file.open("a") as f:
        f.write('{"section": "check", "par')
    assert len(gpu.rows(file)) == 2 and gpu.done(file, "m") == set()


def test_the_page_the_tables_and_the_picture(tmp_path):
    base = dict(machine="m", part="p", run=2.0)
    times = dict(operator="rms_norm", dtype="bf16", length=16, backend="torch", ms=0.1) | {"pass": "forward"}
    rows = [
        base | dict(section="times") | times | dict(run=1.0, ms=9.9),  # of an earlier run: replaced
        base | dict(section="times") | times,
        base | dict(section="check", operator="scan", backend="triton", out="1e-7", verdict="ok"),
        base | dict(section="check", operator="scan", backend="mamba_ssm", verdict="mamba-ssm is not installed"),
        base | dict(section="train", model="mamba", ms=3.0),
        base | dict(section="decode", model="mamba", how="graph", batch=1, tokens_per_s=10),
        dict(section="train", part="q", machine="m", ended="at its limit of 60 s", seconds=60),
    ]
    rows = [json.loads(json.dumps(r)) for r in rows]
    gpu_report.write(rows, tmp_path, "m")
    page = (tmp_path / "gpu.md").read_text()
    assert "| scan |" in page and "not installed" not in page and "9.9" not in page and "train q: ended at its" in page
    assert "not installed" in (tmp_path / "gpu_check.csv").read_text() and (tmp_path / "gpu.png").stat().st_size > 1000
