"""Sweeps with a run that fails, searches that go on, the ledger of runs, resume=auto and SLURM's queue."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from toy import TINY


def test_a_failed_run_of_a_sweep_leaves_the_other_three_alone(call, tmp_path):
    status, out, err = call("-m", *TINY, "model.state_size=4,6,-1,8", "name=s")
    assert status == 1 and "error: run 2 of the sweep failed: model.state_size is -1" in err
    last = out[out.index("sweep: 4 runs, 3 finished, 1 failed") :].splitlines()
    assert [line.split()[:3] for line in last[1:]] == [
        ["0", "model.state_size=4", "finished"],
        ["1", "model.state_size=6", "finished"],
        ["2", "model.state_size=-1", "failed"],
        ["3", "model.state_size=8", "finished"],
    ]
    assert not [*tmp_path.glob(".sweep*"), *tmp_path.glob("multirun.yaml")]
    status, out, _ = call("runs", "runs", entry="ssmzoo")
    assert status == 0 and out.count("finished") == 3 and "model.state_size=8" in out
    # the same command again with resume=auto does not repeat what is done
    status, out, _ = call("-m", *TINY, "model.state_size=4,6", "name=s", "resume=auto")
    assert status == 0 and out.count("is finished") == 2 and "sweep: 2 runs, 2 finished" in out
    status, _, err = call("-m", *TINY, "model.state_size=4,6", "resume=auto")
    assert status == 1 and "needs the sweep's name=" in err


def finished(run: Path, lr: float, seed: int, curve: list[float], mode="min") -> str:
    """A run folder with a validation curve."""
    begin(run, "finished")
    (run / "config.yaml").write_text(f"model_name: lstm\nseed: {seed}\noptim: {{lr: {lr}}}\n")
    lines = [f"{step},{value},{1 - value}" for step, value in enumerate(curve)]
    (run / "metrics.csv").write_text("\n".join(["step,val/loss,val/accuracy", *lines]) + "\n")
    (run / "checkpoints").mkdir()
    index = {"best": [{"name": "x", "value": min(curve)}], "monitor": "val/loss", "mode": mode}
    (run / "checkpoints/index.json").write_text(json.dumps(index))
    return str(run)


def test_runs_are_compared_over_seeds(call, tmp_path):
    curves = {0.001: ([3.0, 1.0, 2.0], [4.0, 3.0, 4.0], [5.0, 4.0, 6.0]), 0.01: ([1.0, 0.5, 0.25],)}
    runs = [
        finished(tmp_path / f"runs/{lr}-{seed}", lr, seed, curve)
        for lr, seeds in curves.items()
        for seed, curve in enumerate(seeds)
    ]
    status, out, _ = call("runs", "compare", *runs, "--out", "bands.png", entry="ssmzoo")
    assert status == 0 and (tmp_path / "bands.png").stat().st_size > 10_000
    rows = [line.split() for line in out.splitlines() if line.startswith("optim.lr=")]
    assert rows == [
        ["optim.lr=0.001", "3", "4.0000", "2.0000", "1.0000", "2"],
        ["optim.lr=0.01", "1", "0.2500", "-", "0.2500", "2"],
    ]
    status, out, _ = call("runs", "compare", *runs, "--metric", "val/accuracy", entry="ssmzoo")
    assert status == 0 and "final val/accuracy" in out
    status, _, err = call("runs", "compare", *runs, "--metric", "val/nothing", entry="ssmzoo")
    assert status == 2 and "val/nothing" in err
    best = finished(tmp_path / "runs/top", 0.1, 0, [0.5, 0.9, 0.8], mode="max")
    _, out, _ = call("runs", "compare", best, best, entry="ssmzoo")
    assert out.splitlines()[1].split()[-2] == "0.9000"


@pytest.mark.slow
def test_a_search_is_kept_and_goes_on_to_its_number_of_trials(call, tmp_path):
    optuna = pytest.importorskip("optuna", reason="the sweep extra is not installed")
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    for n_trials, expected in ((2, 2), (3, 3), (3, 3)):
        status, out, _ = call("-m", *TINY, "hparams_search=optuna", f"n_trials={n_trials}", "name=o")
        assert status == 0
        study = optuna.load_study(study_name="ssmzoo", storage="sqlite:///optuna.db")
        assert len(study.trials) == expected and len(list((tmp_path / "runs/lstm").iterdir())) == expected
    assert len({str(trial.params) for trial in study.trials}) == 3  # the trials after a break are others
    assert {"++optim.lr", "++optim.weight_decay"} == set(study.best_trial.params)


@pytest.mark.slow
def test_a_sweep_over_cores_survives_a_failing_run(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="the sweep extra is not installed")
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "-m",
            "hydra/launcher=joblib",
            "hydra.launcher.n_jobs=2",
            *TINY,
            "model.state_size=4,-1",
            "name=j",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=1200,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 1 and "sweep: 2 runs, 1 finished, 1 failed" in result.stdout, result.stderr


def begin(run: Path, status: str, **note) -> Path:
    """A run folder as another process would leave it."""
    from ssmzoo.train import ledger

    run.mkdir(parents=True)
    (run / "config.yaml").write_text("model_name: lstm\n")
    ledger.write_status(run, status, **note)
    return run


def test_the_ledger_knows_killed_runs_and_why_others_failed(call, tmp_path):
    from ssmzoo.train.ledger import newest_unfinished, read_status

    begin(tmp_path / "runs/lstm/alive", "running")
    failed = begin(tmp_path / "runs/lstm/bad", "failed", note="NaN or Inf at step 3")
    killed = begin(tmp_path / "runs/lstm/gone", "running")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host = (killed / "status.txt").read_text().split()[2]
    (killed / "status.txt").write_text(f"running\n{process.pid} {host} 1\n")
    begin(tmp_path / "runs/lstm/done", "finished")
    assert read_status(killed)[0] == "killed" and read_status(tmp_path / "runs/lstm/alive")[0] == "running"
    os.utime(failed / "status.txt", (1, 1))
    os.utime(failed / "config.yaml", (1, 1))
    assert newest_unfinished(tmp_path / "runs/lstm") == killed
    _, out, _ = call("runs", "runs", entry="ssmzoo")
    assert "NaN or Inf at step 3" in out and out.count("python train.py resume=") == 2 and "killed" in out
    status, _, err = call("resume=runs/lstm/alive", "model=lstm")
    assert status == 2 and f"is being trained by process {os.getpid()}" in err


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(call, tmp_path):
    from ssmzoo.train.logger import read_metrics

    def rows():  # times differ
        found = read_metrics(run / "metrics.csv")
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "system/"))} for row in found]

    assert call(*TINY, "name=a")[0] == 0
    run = tmp_path / "runs/lstm/a"
    text, whole = (run / "metrics.csv").read_text(), rows()
    for path in (run / "checkpoints").rglob("*"):
        path.unlink() if path.is_file() else None
    for path in sorted((run / "checkpoints").rglob("*"), reverse=True):
        path.rmdir()
    (run / "metrics.csv").write_text(text[: len(text) // 2])
    (run / "status.txt").write_text("running\n")
    status, out, _ = call(*TINY, "name=a", "resume=auto")
    assert status == 0 and "has no checkpoint yet: starting at step 0" in out
    assert rows() == whole


SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS_PER_NODE": "1",
}


@pytest.mark.parametrize(
    "name, more, called",
    [
        ("SIGUSR1", {}, [["scontrol", "requeue", "4711"]]),
        ("SIGUSR1", {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "7"}, [["scontrol", "requeue", "40_7"]]),
        ("SIGUSR1", {"SLURM_PROCID": "1"}, []),
        ("SIGTERM", {}, []),
    ],
)
def test_a_signal_before_the_first_step_puts_the_job_back_too(tmp_path, monkeypatch, name, more, called):
    from ssmzoo.train import callbacks

    for key, value in (SLURM | more).items():
        monkeypatch.setenv(key, value)
    calls = []
    monkeypatch.setattr(callbacks.subprocess, "run", lambda command, **_: calls.append(command))
    with pytest.raises(SystemExit) as stop, callbacks.interruptible(begin(tmp_path / "run", "running")):
        signal.raise_signal(getattr(signal, name))
    assert stop.value.code == 75 and calls == called


@pytest.mark.slow
def test_slurm_puts_a_signalled_job_back_into_the_queue(tmp_path):
    """scontrol is a stand-in that writes down what it was called with."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    (tmp_path / "scontrol").chmod(0o755)
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "trainer.max_steps=100000", "name=q", "resume=auto"]
    environment = (
        os.environ
        | SLURM
        | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    )
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    metrics, deadline = tmp_path / "runs/lstm/q/metrics.csv", time.monotonic() + 1200
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    out = process.communicate(timeout=1200)[0]
    assert process.returncode == 75 and "SLURM job 4711 is back in the queue" in out
    assert (tmp_path / "called").read_text() == "requeue 4711\n"
    last = json.loads((tmp_path / "runs/lstm/q/checkpoints/index.json").read_text())["last"]
    again = subprocess.run(
        [*command, f"trainer.max_steps={int(last[5:13]) + 2}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )  # as the queue would start it once more
    assert again.returncode == 0 and f"steps                      {int(last[5:13]) + 2}" in again.stdout, again.stdout
