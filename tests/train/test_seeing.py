"""What a run leaves behind: the same names and steps in every logger, a profile, a configuration that repeats it."""

import argparse
import sys

import pytest

TINY = [
    "model=mamba",
    "model.d_model=16",
    "model.n_layer=1",
    "data.seq_len=32",
    "data.batch_size=4",
    "data.val_tokens=512",
    "task.sample_tokens=0",
    "trainer.accelerator=cpu",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=2",
    f"data.path={argparse.__file__}",
]


@pytest.fixture
def train(call, tmp_path):
    def run(*arguments):
        given = () if any(a.startswith("config=") for a in arguments) else (*TINY, "data.cache_dir=cache")
        status, _, error = call(*given, *arguments)
        assert not status, error
        return tmp_path / "runs/mamba"

    return run


def rows(run):
    from ssmzoo.train.logger import read_metrics

    return read_metrics(run / "metrics.csv")


def seen(rows_):
    """{(name, step)} of the metrics, the clock's left out."""
    return {(k, int(r["step"])) for r in rows_ for k in r if k.startswith(("train/", "val/"))}


def test_the_resolved_configuration_recreates_the_run(train):
    runs = train("name=a", "optim.lr=3e-3", "seed=5")
    train(f"config={runs / 'a'}", "name=b")
    train(f"config={runs / 'a' / 'config.yaml'}", "name=c", "optim.lr=1e-3")
    losses = [[(r["step"], r["train/loss"]) for r in rows(runs / n) if "train/loss" in r] for n in "abc"]
    assert losses[0] == losses[1] and len(losses[0]) == 3 and losses[0] != losses[2]


def test_tensorboard_and_csv_carry_the_same_names_and_steps(train):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("name=t", "logger=tensorboard") / "t"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {(tag, e.step) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    assert {f for f in found if f[0].startswith(("train/", "val/"))} == seen(rows(run))
    assert {s for n, s in found if n == "train/loss"} == {2, 4, 6}


def test_wandb_and_csv_carry_the_same_names_and_steps(train, monkeypatch, tmp_path):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    from lightning.pytorch.loggers import WandbLogger

    for name, value in (("HOME", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    sent, log = [], WandbLogger.log_metrics

    def record(self, metrics, step=None):
        sent.append({"step": step} | metrics)
        log(self, metrics, step)

    monkeypatch.setattr(WandbLogger, "log_metrics", record)
    run = train("name=w", "logger=wandb") / "w"
    assert seen(sent) == seen(rows(run)) and list(run.glob("wandb/offline-run-*"))


def test_a_profile_names_the_ten_costliest_operators(train):
    import json

    run = train("name=p", "debug=profiler") / "p"
    lines = (run / "profile.txt").read_text().splitlines()
    assert "5 steps" in lines[0] and sum("%" in line for line in lines) >= 10
    assert json.loads((run / "trace.json").read_text())["traceEvents"]


def test_a_run_says_how_long_it_waited_for_data(train):
    run = train("name=d") / "d"
    shares = [r["time/data_wait"] for r in rows(run) if "time/data_wait" in r]
    assert shares and all(0 <= s < 0.9 for s in shares)


def test_starting_a_run_loads_no_heavy_library_that_it_does_not_use():
    import subprocess

    code = (
        "import sys, ssmzoo.train.run; print([m for m in ('torchvision', 'transformers', 'matplotlib', "
        "'scipy.signal', "
        "'timm', 'wandb', 'tensorboard', 'torchmetrics.functional') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_torchmetrics_is_whole_when_it_is_asked_for():
    import ssmzoo.train  # noqa: F401

    pytest.importorskip("torchmetrics")
    from torchmetrics import MeanMetric

    mean = MeanMetric()
    mean.update(2.0)
    assert float(mean.compute()) == 2.0


def test_memory_is_predicted_and_shared_out(capsys):
    from ssmzoo.cli.main import main

    with pytest.raises(SystemExit) as stop:
        main(["info", "mamba", "--memory", "--batch", "4", "--gpus", "4"])
    out = capsys.readouterr().out
    assert not stop.value.code and "under trainer=ddp" in out and "under trainer=fsdp" in out and "MiB" in out
