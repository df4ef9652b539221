"""train.py, eval.py and the console script as a user runs them, on a corpus of a few files."""

import json
import math
import os
import signal
import time

import forked
import pytest
import torch
from paths import ROOT

TINY = [
    "model.d_model=16",
    "data.seq_len=32",
    "data.batch_size=4",
    "data.val_tokens=512",
    "task.sample_tokens=8",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, file in enumerate(sorted((ROOT / "ssmzoo").glob("*.py"))):
        (folder / f"{i}.py").write_text(file.read_text())
    return folder


@pytest.fixture
def call(call, corpus):
    """The shared one, with this corpus unless another is named."""

    def run(*arguments, entry="train"):
        own = entry != "train" or any(a.startswith("data.path=") for a in arguments)
        return call(*arguments, *([] if own else [f"data.path={corpus}", "data.cache_dir=cache"]), entry=entry)

    return run


@pytest.mark.parametrize("model", ["mamba", "moe_mamba", "transformer", "transformer_moe"])
def test_training_leaves_a_run_folder_that_explains_itself(call, tmp_path, model):
    size = {
        "mamba": ["model.n_layer=1"],
        "transformer": ["model.n_blocks=1", "model.n_heads=2"],
        "moe_mamba": ["model.n_blocks=1", "model.n_experts=4"],
        "transformer_moe": ["model.n_blocks=1", "model.n_heads=2", "model.n_experts=4"],
    }[model]
    status, out, err = call(f"model={model}", *TINY, *size, "name=a")
    assert (status, err) == (0, "")
    run = tmp_path / "runs" / model / "a"
    for file in ("config.yaml", "metrics.csv", "curves.png", "report.md", "checkpoints/index.json"):
        assert (run / file).stat().st_size > 0, file
    for shown in (
        "validation loss",
        "perplexity",
        "bits per byte",
        "unigram",
        "tokens/s",
        "tokens seen",
        "sampled continuation",
        f"run folder: runs/{model}/a",
    ):
        assert shown in out
    assert ("experts' load" in out and "tokens dropped" in out and "active per token" in out) == ("moe" in model)
    index = json.loads((run / "checkpoints/index.json").read_text())
    best = run / "checkpoints" / index["best"][0]["name"]
    assert sorted(f.name for f in best.iterdir()) == ["manifest.json", "model.safetensors", "trainer.ckpt"]
    status, out, _ = call(f"ckpt={run}", "task.eval_lengths=[1,2]", entry="eval")
    assert status == 0 and "context 64" in out and (run / "eval/length_extrapolation.png").exists()


def test_one_seed_gives_one_result_and_the_resolved_config_recreates_the_run(call, tmp_path):
    from ssmzoo.checkpoint_files import read_weights

    for name in ("a", "b"):
        assert call("model=mamba", "model.n_layer=1", *TINY, f"name={name}")[0] == 0
    a, b = (read_weights(tmp_path / "runs/mamba" / n) for n in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model=mambo"], ["unknown model 'mambo'", "nearest: mamba"]),
        (["data=texts"], ["unknown data 'texts'", "nearest: text"]),
        (["task=languages"], ["unknown task", "nearest: language"]),
        (["sead=1"], ["sead", "nearest: seed"]),
        (["model=mamba", "model.d_modell=8"], ["model.d_modell", "nearest: d_model"]),
        (["model=mamba", "model.d_model=-8"], ["-8"]),
        (["model=mamba", "model.d_model=wide"], ["model.d_model", "'wide'", "int"]),
        (["model=transformer", "model.d_model=30", "model.n_heads=4"], ["30", "4"]),
        (["model=moe_mamba", "model.n_experts=2", "model.top_k=3"], ["3", "2"]),
        (["optim.lr=-1"], ["optim.lr", "-1"]),
        (["optim.schedule_kind=cosine_annealing"], ["schedule", "cosine"]),
        (["trainer.max_steps=0"], ["max_steps"]),
        (["resume=/nowhere"], ["/nowhere", "not a run folder"]),
        (["logger.project=x"], ["logger.project"]),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(call, tmp_path, arguments, words):
    status, out, err = call(*arguments)
    assert status == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err
    assert "Traceback" not in out + err and not list(tmp_path.rglob("config.yaml"))


def test_a_corpus_that_is_missing_empty_or_too_short_is_refused(call, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    short = tmp_path / "short.txt"
    short.write_text("abc")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(bytes(range(256)) * 10)
    for path in (tmp_path / "none.txt", empty, short, binary):
        status, _, err = call("model=mamba", *TINY, f"data.path={path}", "name=a")
        assert status == 2 and path.name in err and not (tmp_path / "runs/mamba").exists()


def test_an_existing_run_is_not_written_over(call, tmp_path):
    assert call("model=mamba", "model.n_layer=1", *TINY, "name=a")[0] == 0
    metrics = tmp_path / "runs/mamba/a/metrics.csv"
    before = metrics.read_text()
    status, _, err = call("model=mamba", "model.n_layer=1", *TINY, "name=a")
    assert status == 2 and "holds a run already" in err and metrics.read_text() == before


def test_a_run_that_dies_before_its_last_validation_makes_up_for_it(call, tmp_path, monkeypatch):
    """Behind the last step, which no interval ends at, the state is saved first and validated then."""
    from ssmzoo.train.checkpointer import Checkpointer

    how = ["model=mamba", "model.n_layer=1", *TINY, "trainer.max_steps=5", "callbacks.checkpoint.every_n_steps=2"]
    assert call(*how, "name=whole")[0] == 0

    def die(self, trainer, task):
        if trainer.global_step == 5:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "on_validation_start", die)
        assert call(*how, "name=killed")[0] == 1
    whole, killed = (tmp_path / "runs/mamba" / name for name in ("whole", "killed"))
    last = json.loads((killed / "checkpoints/index.json").read_text())["last"]
    assert last == json.loads((whole / "checkpoints/index.json").read_text())["last"]
    assert call(f"resume={killed}")[0] == 0
    from ssmzoo.checkpoint_files import read_weights

    for which in ("last", "best"):
        a, b = read_weights(whole, which), read_weights(killed, which)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows = [[r.split(",")[:2] for r in (run / "metrics.csv").read_text().splitlines()] for run in (whole, killed)]
    assert len(rows[0]) == len(rows[1]) and rows[0][0] == rows[1][0]


def test_a_diverging_run_stops_with_the_step_and_keeps_the_last_good_checkpoint(call, tmp_path):
    status, _, err = call(
        "model=mamba",
        "model.n_layer=1",
        *TINY,
        "trainer.max_steps=40",
        "optim.lr=1e30",
        "trainer.gradient_clip_val=0",
        "optim.warmup_steps=0",
        "callbacks.checkpoint.every_n_steps=1",
        "name=a",
    )
    assert status == 1 and "NaN or Inf at step" in err and "learning rate" in err and "gradient norm" in err
    from ssmzoo.checkpoint_files import read_weights

    assert all(v.isfinite().all() for k, v in read_weights(tmp_path / "runs/mamba/a", prefer="last").items())
    assert (tmp_path / "runs/mamba/a/bad_batch.pt").exists()


def test_damaged_and_foreign_checkpoints_are_refused(call, tmp_path):
    assert call("model=mamba", "model.n_layer=1", *TINY, "name=a")[0] == 0
    run = tmp_path / "runs/mamba/a"
    store = run / "checkpoints" / json.loads((run / "checkpoints/index.json").read_text())["last"]
    weights = store / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    status, _, err = call(f"ckpt={run}", entry="eval")
    assert status == 2 and "SHA-256" in err
    weights.write_bytes(whole)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["config"]["model"]["_target_"] = "os.system"
    (store / "manifest.json").write_text(json.dumps(manifest))
    status, _, err = call(f"ckpt={run}", entry="eval")
    assert status == 2 and "os.system" in err and "ssmzoo.models" in err
    manifest["files"] = {"../../secret": "0"}
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert "outside the checkpoint folder" in call(f"ckpt={run}", entry="eval")[2]


def test_wandb_runs_offline_without_a_key(call, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    status, out, _ = call("model=mamba", "model.n_layer=1", *TINY, "logger=wandb", "name=w")
    assert status == 0 and "wandb sync" in out and list((tmp_path / "runs/mamba/w").glob("wandb/offline-run-*"))
    from ssmzoo.terminal import Printable

    assert not Printable.colours  # its colours end with its run


@pytest.mark.parametrize(
    "option",
    [
        ["optim=muon"],
        ["callbacks.ema.decay=0.9"],
        ["trainer.accumulate_grad_batches=2"],
        ["trainer.precision=bf16-mixed"],
        ["grad_checkpointing=true"],
    ],
    ids=lambda o: o[0],
)
def test_options_of_the_loop_train(call, tmp_path, option):
    status, out, err = call("model=moe_mamba", "model.n_blocks=1", "model.n_experts=4", *TINY, *option, "name=a")
    assert (status, err) == (0, "")
    loss = float(out.split("validation loss")[1].split()[0])
    assert math.isfinite(loss) and loss < 7


@pytest.mark.slow
def test_compile_trains(call):
    assert call("model=mamba", "model.n_layer=1", *TINY, "compile=true", "name=a")[0] == 0


def test_killed_and_stopped_runs_continue_bit_for_bit(tmp_path, corpus):
    common = [
        "model=moe_mamba",
        "model.n_blocks=1",
        "model.n_experts=4",
        *TINY,
        "trainer.max_steps=60",
        f"data.path={corpus}",
        "callbacks.checkpoint.every_n_steps=4",
        f"runs_dir={tmp_path}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(*arguments):
        return forked.Python(ROOT / "train.py", *arguments, cwd=tmp_path, env=environment)

    whole = start(*common, "name=whole")
    broken = start(*common, "name=broken")
    run = tmp_path / "moe_mamba/broken"
    for sent in (signal.SIGKILL, signal.SIGTERM):
        known = (run / "checkpoints/index.json").read_text() if (run / "checkpoints/index.json").exists() else ""
        deadline = time.monotonic() + 1200
        while time.monotonic() < deadline and broken.poll() is None:
            index = run / "checkpoints/index.json"
            if index.exists() and index.read_text() != known:
                break
            time.sleep(0.02)
        broken.send_signal(sent)
        printed = broken.communicate()
        if sent == signal.SIGTERM and "run folder" not in printed:
            assert broken.returncode == 75 and "continue with" in printed
        broken = start(f"resume={run}")
    assert broken.wait(timeout=1200) == 0 and whole.wait(timeout=1200) == 0

    from ssmzoo.train.logger import read_metrics

    def losses(name):
        rows = read_metrics(tmp_path / "moe_mamba" / name / "metrics.csv")
        return [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]

    assert losses("broken") == losses("whole") and len(losses("whole")) == 60


@pytest.mark.parametrize("more, times", [([], 1), (["hydra.job.chdir=false"], 2)])
def test_a_plain_command_is_composed_once_and_libraries_log_nothing(call, monkeypatch, more, times):
    import logging

    from hydra._internal.hydra import Hydra

    composed, compose, library = [], Hydra.compose_config, logging.getLogger("a library")
    monkeypatch.setattr(Hydra, "compose_config", lambda *a, **k: composed.append(1) or compose(*a, **k))
    monkeypatch.setattr(library, "disabled", False)
    assert call("model=lstm", "optim.lr=fast", *more)[0] == 2
    assert len(composed) == times and library.disabled


def test_the_console_script_lists_and_explains(capsys):
    from ssmzoo.cli.main import main

    for arguments in (["list", "models", "*mamba*"], ["list", "tasks"], ["info", "mamba_130m"], ["backends"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
    out = capsys.readouterr().out
    assert "moe_mamba_25m" in out and "129,135,360" in out and "selective_scan_fn" in out
    with pytest.raises(SystemExit) as stop:
        main(["info", "mamba_131m"])
    assert stop.value.code == 2 and "nearest: mamba_130m" in capsys.readouterr().err


def test_verify_reports_failures_and_unknown_families(tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    from ssmzoo.cli.main import main

    source = ROOT / "tests/golden/selective_scan"
    shutil.copytree(source, tmp_path / "selective_scan")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path)])
    assert not stop.value.code
    file = tmp_path / "selective_scan/variable_bc.safetensors"
    tensors = load_file(file)
    tensors["output/out"] = tensors["output/out"] * 1.01
    save_file(tensors, file)
    (tmp_path / "hyena").mkdir()
    (tmp_path / "hyena/x.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path)])
    out = capsys.readouterr().out
    assert stop.value.code == 1 and "FAIL" in out and "unsupported" in out
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(tmp_path), "--family", "mamba"])
    assert stop.value.code == 2 and "no case of family 'mamba'" in capsys.readouterr().err
