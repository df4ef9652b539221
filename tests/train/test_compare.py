"""`ssmzoo runs compare`: what is pooled as seeds, what is told apart, and what a mean would hide; damaged runs."""

import json

import pytest
from test_changes import TINY
from test_sweeps import finished
from tried import tried


def table(out: str) -> dict[str, int]:
    """{label: runs} of the comparison's table."""
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("configuration"))
    rows = [line for line in lines[start + 1 :] if line.strip()]
    rows = rows[: next(i for i, line in enumerate(rows) if line.startswith(("warning:", "curves in")))]
    return {row.split("  ")[0]: int(row.split("  ", 1)[1].split()[0]) for row in rows}


def compare(call, *runs) -> tuple[dict[str, int], str]:
    status, out, err = call("runs", "compare", *map(str, runs), entry="ssmzoo")
    assert status == 0, err
    return table(out), out


def test_a_sweep_of_two_by_two_has_four_rows_and_bands_over_seeds_only(call, tmp_path):
    status, _, _ = call("-m", *TINY, "name=s", "optim.lr=0.01,0.1", "data.max_length=8,16", "seed=0,1")
    assert status == 0
    found, out = compare(call, *sorted((tmp_path / "runs/lstm").iterdir()))
    labels = {f"data.max_length={length}, optim.lr={lr}" for length in (8, 16) for lr in (0.01, 0.1)}
    assert found == dict.fromkeys(labels, 2) and "warning" not in out
    found, _ = compare(call, *sorted((tmp_path / "runs/lstm").iterdir())[::2])  # one seed: no spread to draw
    assert found == dict.fromkeys(labels, 1)


def test_a_run_resumed_with_another_rate_is_no_seed_of_one_that_always_had_it(call, tmp_path):
    whole, changed = tmp_path / "runs/lstm/whole", tmp_path / "runs/lstm/changed"
    assert call(*TINY[:-1], "name=whole", "optim.lr=0.1")[0] == 0
    assert call(*TINY[:-1], "name=changed", "optim.lr=0.5", "seed=1", "trainer.max_steps=2")[0] == 0
    assert call(f"resume={changed}", "optim.lr=0.1", "trainer.max_steps=4", "logger=csv")[0] == 0
    found, _ = compare(call, whole, changed)
    said = "optim.lr=0.1 from step 2 (was 0.5); trainer.max_steps=4 from step 2 (was 2)"
    assert found == {"all": 1, f"resumed={said}": 1}
    assert said in (changed / "report.md").read_text() and "changed when" not in (whole / "report.md").read_text()


def test_data_of_another_content_under_one_name_are_told_apart(call, tmp_path):
    runs = []
    for name, seed, content in (("a", 0, "1" * 64), ("b", 1, "1" * 64), ("c", 2, "2" * 64)):
        runs.append(finished(tmp_path / "runs" / name, 0.1, seed, [2.0, 1.0]))
        step = tmp_path / "runs" / name / "checkpoints/x"
        step.mkdir()
        (step / "manifest.json").write_text(json.dumps({"data": {"corpus": "mine", "fingerprint": content}}))
    assert compare(call, *runs)[0] == {"data.content=11111111": 2, "data.content=22222222": 1}


def test_a_seed_that_comes_twice_and_a_run_that_did_not_end_are_named(call, tmp_path):
    runs = [finished(tmp_path / f"runs/{i}", 0.1, seed, [2.0, 1.0]) for i, seed in enumerate((0, 0, 1))]
    (tmp_path / "runs/2/status.txt").write_text("stopped\nstopped by SIGTERM at step 1\n")
    _, out = compare(call, *runs)
    assert f"warning: {runs[1]} and {runs[0]} are the same configuration with the same seed" in out
    assert f"warning: {runs[2]} is stopped: its last value is of step 1" in out


DAMAGE = {
    "config cut": ("config.yaml", "a: [1"),
    "config a list": ("config.yaml", "[1, 2]"),
    "config no text": ("config.yaml", b"\xff\xfe\x00"),
    "config nested": ("config.yaml", "[" * 10_000),
    "rows no numbers": ("metrics.csv", "step,val/loss\n0,abc\n"),
    "rows no text": ("metrics.csv", b"\xff\xfe\x00\n\x00\n"),
    "rows NUL": ("metrics.csv", b"step,val/loss\n0,\x00\n"),
    "rows without steps": ("metrics.csv", "epoch,val/loss\n0,1.0\n"),
    "rows beyond numbers": ("metrics.csv", "step,val/loss\ninf,1.0\n"),
    "index cut": ("checkpoints/index.json", '{"last": '),
    "index of words": ("checkpoints/index.json", '{"best": [{"name": "x", "value": "low"}]}'),
    "index of lists": ("checkpoints/index.json", '{"best": [{"name": "x", "value": [1]}]}'),
    "history without steps": ("resumed.csv", "nothing\n1\n"),
    "manifest no JSON": ("checkpoints/x/manifest.json", "{"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_run_is_named_and_hides_no_other(call, tmp_path, kind):
    for name in ("good", "bad"):
        finished(tmp_path / "runs" / name, 0.1, 0, [2.0, 1.0])
    tried("damaged run folders")
    file, content = DAMAGE[kind]
    (tmp_path / "runs/bad" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "runs/bad" / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = call("runs", "runs", entry="ssmzoo")
    assert status == 0 and not err and "runs/good" in out, out + err
    assert out.count("damaged: ") == 1 and f"damaged: {'runs/bad'}: " in out and file in out, out
    status, out, err = call("runs", "compare", "runs/good", "runs/bad", entry="ssmzoo")
    assert status == 2 and err.count("\n") == 1 and file in err, err
