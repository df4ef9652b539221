"""Disks that are full, read-only or gone: the run says so, goes on, tries again and loses no earlier checkpoint."""

import contextlib
import json
import os
import shutil
import subprocess

import pytest
import torch
from toy import At, ToyData, make

from ssmzoo.train import checkpoint as files
from ssmzoo.train.checkpoint import FolderCheckpointIO, last_good_checkpoint
from ssmzoo.train.errors import TrainingFailed
from ssmzoo.train.logger import read_metrics


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where that may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def names(run):
    index = json.loads((run / "checkpoints/index.json").read_text())
    return [index["last"], *index["recent"], *(b["name"] for b in index["best"])]


def readable(run):
    for name in set(names(run)):
        FolderCheckpointIO(dict).load_checkpoint(run / "checkpoints" / name)
    return True


def fill(disk):
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 14))


def test_a_full_disk_costs_nothing_but_the_checkpoints_it_has_no_room_for(small_disk, capsys):
    run, seen = small_disk / "run", []

    def full():
        fill(small_disk)

    def still_there():
        seen.append((readable(run), names(run)[0]))

    actions = {6: full, 11: still_there, 13: lambda: (small_disk / "ballast").unlink(), 14: still_there}
    trainer, task, checkpointer, _ = make(
        run, width=8000, first=[At(actions)], max_steps=20, checkpoint={"every_n_steps": 5}, val_check_interval=100
    )
    trainer.fit(task, datamodule=ToyData())
    out = capsys.readouterr().out
    assert trainer.global_step == 20 and not checkpointer.failures
    assert "could not be written" in out and "No space left" in out and "tries again" in out
    assert seen == [(True, "step-00000005"), (True, "step-00000013")]  # tried again as soon as there was room
    assert names(run)[0] == "step-00000020" and readable(run)
    assert not list((run / "checkpoints").glob(".*"))
    assert [r["step"] for r in read_metrics(run / "metrics.csv") if "train/loss" in r] == list(range(1, 21))


def test_a_disk_that_stays_full_keeps_the_last_good_checkpoint(small_disk, monkeypatch):
    run = small_disk / "run"
    monkeypatch.setattr("ssmzoo.train.checkpointer.time.sleep", lambda seconds: None)
    trainer, task, checkpointer, _ = make(
        run,
        width=8000,
        first=[At({6: lambda: fill(small_disk)})],
        max_steps=12,
        checkpoint={"every_n_steps": 5},
        val_check_interval=100,
    )
    trainer.fit(task, datamodule=ToyData())
    assert trainer.global_step == 12 and checkpointer.failures > 1  # which ends the run with status 75
    assert last_good_checkpoint(run).name == "step-00000005"
    (small_disk / "ballast").unlink()
    again, task, checkpointer, _ = make(run, width=8000, max_steps=12, checkpoint={"every_n_steps": 5})
    again.fit(task, datamodule=ToyData(), ckpt_path=last_good_checkpoint(run), weights_only=True)
    assert last_good_checkpoint(run).name == "step-00000012" and not checkpointer.failures


def test_a_read_only_folder_is_reported_and_tried_again(small_disk, capsys):
    run = small_disk / "run"

    def mode(option):
        return lambda: subprocess.run(["mount", "-o", f"remount,{option}", str(small_disk)], check=True)

    trainer, task, _, _ = make(
        run, first=[At({3: mode("ro"), 8: mode("rw")})], max_steps=12, checkpoint={"every_n_steps": 2}
    )
    trainer.fit(task, datamodule=ToyData())
    out = capsys.readouterr().out
    assert "Read-only file system" in out and out.count("metrics.csv could not be written") <= 3
    assert names(run)[0] == "step-00000012" and readable(run)
    assert [r["step"] for r in read_metrics(run / "metrics.csv") if "train/loss" in r] == list(range(1, 13))


def begun(run):
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")


REMOVALS = {
    "removed": shutil.rmtree,
    "moved": lambda run: run.rename(run.with_name("elsewhere")),
    "removed and made again": lambda run: (shutil.rmtree(run), run.mkdir()),
    "its configuration removed": lambda run: (run / "config.yaml").unlink(),
}


@pytest.mark.parametrize("rows", [1, 100], ids=["a row each step", "no rows"])
@pytest.mark.parametrize("kind", REMOVALS)
def test_a_run_whose_folder_is_removed_ends_with_words(tmp_path, kind, rows):
    run = tmp_path / "run"
    begun(run)
    remove = {7: lambda: REMOVALS[kind](run)}
    trainer, task, _, _ = make(
        run, first=[At(remove)], max_steps=12, checkpoint={"every_n_steps": 2}, log_every_n_steps=rows
    )
    with pytest.raises(TrainingFailed, match="was removed while the run went on"):
        trainer.fit(task, datamodule=ToyData())
    assert trainer.global_step == 7 and run.exists() == (kind in list(REMOVALS)[2:])


@pytest.mark.parametrize("what", ["weight", "statistics"])
def test_weights_that_overflow_are_not_kept_and_end_the_run(tmp_path, capsys, what):
    def spoil():
        spoilt = task.model[0].weight.data if what == "weight" else task.model[0].statistics
        spoilt.fill_(float("inf"))

    trainer, task, _, _ = make(
        tmp_path, first=[At({12: spoil})], max_steps=12, checkpoint={"every_n_steps": 4}, limit_val_batches=0
    )
    task.model[0].register_buffer("statistics", torch.ones(2))
    with pytest.raises(TrainingFailed, match="weights are NaN or Inf at step 12"):
        trainer.fit(task, datamodule=ToyData())
    assert "not saved" in capsys.readouterr().out and last_good_checkpoint(tmp_path).name == "step-00000008"


@pytest.mark.parametrize(
    "damage", ["", '{"last": ', "[]", '{"last": 3}', None], ids=["empty", "cut", "list", "kind", "gone"]
)
def test_an_index_is_put_together_from_whole_checkpoints(tmp_path, damage, capsys):
    trainer, task, _, _ = make(tmp_path, checkpoint={"every_n_steps": 4, "keep_last": 3}, val_check_interval=6)
    trainer.fit(task, datamodule=ToyData())
    file = tmp_path / "checkpoints/index.json"
    before = json.loads(file.read_text())
    file.unlink() if damage is None else file.write_text(damage)
    shutil.rmtree(tmp_path / "checkpoints" / before["recent"][0])
    (tmp_path / "checkpoints" / before["recent"][0]).mkdir()  # half of a checkpoint
    assert last_good_checkpoint(tmp_path).name == before["last"] == "step-00000012"
    assert "taken together from" in capsys.readouterr().out
    again, task, checkpointer, _ = make(tmp_path, max_steps=16, checkpoint={"every_n_steps": 4, "keep_last": 3})
    assert checkpointer.index["recent"] == before["recent"][1:]
    again.fit(task, datamodule=ToyData(), ckpt_path=last_good_checkpoint(tmp_path), weights_only=True)
    assert readable(tmp_path) and names(tmp_path)[0] == "step-00000016"


def test_a_failing_write_is_survived_whatever_it_raises(tmp_path, monkeypatch, capsys):
    """The same without a mount: safetensors and torch raise errors of their own."""
    from safetensors import SafetensorError

    errors = [
        SafetensorError("I/O error: No space left on device"),
        RuntimeError("[enforce fail] PytorchStreamWriter"),
        OSError(28, "No space left on device"),
    ]
    save = files._save_tensors

    def failing(*args):
        if errors:
            error = errors.pop(0)
            raise error if isinstance(error, OSError) else OSError(str(error)) from error
        save(*args)

    monkeypatch.setattr(files, "_save_tensors", failing)
    run = tmp_path / "run"
    trainer, task, _, _ = make(run, max_steps=12, checkpoint={"every_n_steps": 3}, val_check_interval=100)
    trainer.fit(task, datamodule=ToyData())
    assert capsys.readouterr().out.count("could not be written") == 3
    assert names(run)[0] == "step-00000012" and readable(run)


def test_a_damaged_checkpoint_is_passed_over_when_resuming(tmp_path, capsys):
    run = tmp_path / "run"
    trainer, task, _, _ = make(run, checkpoint={"every_n_steps": 4, "keep_last": 3}, val_check_interval=100)
    trainer.fit(task, datamodule=ToyData())
    assert last_good_checkpoint(run).name == "step-00000012"
    damaged = run / "checkpoints/step-00000012/trainer.ckpt"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert last_good_checkpoint(run).name == "step-00000008"
    assert "SHA-256" in capsys.readouterr().out
    assert last_good_checkpoint(tmp_path) is None


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints/.step-00000004.123.tmp").mkdir(parents=True)
    (run / "checkpoints/.index.json.123.tmp").touch()
    (run / "checkpoints/step-00000004").mkdir()  # renamed, but the index did not come to name it
    (run / "metrics.csv").write_text("step,train/loss\n1,1.0\n2,0.")  # a row cut off
    trainer, task, _, _ = make(run, max_steps=4, checkpoint={"every_n_steps": 4}, val_check_interval=100)
    trainer.loggers[0].continue_after(0)
    trainer.fit(task, datamodule=ToyData())
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["index.json", "step-00000004"]
    rows = read_metrics(run / "metrics.csv")
    assert [r["step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4] and readable(run)


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ssmzoo.train.tracking import tensorboard_logger

    for after, last in ((None, 6), (3, 8)):  # killed after step 6, resumed from the checkpoint at 3
        logger = tensorboard_logger(tmp_path, after)
        for step in range((after or 0) + 1, last + 1):
            logger.log_metrics({"train/loss": float(step)}, step)
        logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
