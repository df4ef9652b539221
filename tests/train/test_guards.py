"""What can go wrong while a run is alone: dead workers and experts, a step that hangs, memory, NaN, signals, time."""

import json
import os
import signal
import time

import pytest
import torch
from torch import nn
from toy import At, Regression, ToyData, make

from ssmzoo.data.loader import ResumableLoader
from ssmzoo.tasks.base import StepOutput
from ssmzoo.train.callbacks import TimeLimit
from ssmzoo.train.checkpoint import last_good_checkpoint
from ssmzoo.train.errors import TrainingFailed
from ssmzoo.train.logger import read_metrics
from ssmzoo.train.watchdog import Watchdog


class Suicidal(torch.utils.data.Dataset):
    """Kills the worker that asks for sample 13, as often as the file says."""

    def __init__(self, lives):
        self.lives = lives

    def __len__(self):
        return 24

    def __getitem__(self, draw):
        if draw.index == 13 and torch.utils.data.get_worker_info() and int(self.lives.read_text()):
            self.lives.write_text(str(int(self.lives.read_text()) - 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return draw.index


def test_a_dead_data_worker_is_replaced_and_no_sample_is_lost(tmp_path, capsys):
    lives = tmp_path / "lives"
    lives.write_text("1")
    loader = ResumableLoader(Suicidal(lives), 3, shuffle=True, num_workers=2)
    got = [batch.tolist() for batch in loader]
    lives.write_text("0")
    assert got == [batch.tolist() for batch in ResumableLoader(Suicidal(lives), 3, shuffle=True)]
    assert capsys.readouterr().out.count("starting new ones at the same batch") == 1


@pytest.mark.slow  # torch looks for dead workers every five seconds
def test_workers_that_die_again_and_again_end_the_run(tmp_path):
    lives = tmp_path / "lives"
    lives.write_text("9")
    with pytest.raises(RuntimeError, match="data workers died 3 times in a row.*data.num_workers"):
        list(ResumableLoader(Suicidal(lives), 3, num_workers=1))


def test_an_error_in_the_data_is_no_dead_worker():
    class Broken(Suicidal):
        def __getitem__(self, draw):
            raise RuntimeError("picture 7 is damaged")

    with pytest.raises(RuntimeError, match="picture 7 is damaged"):
        list(ResumableLoader(Broken(None), 3, num_workers=1))


def test_a_stuck_step_is_reported_with_where_it_stands(tmp_path, capsys):
    seen = []

    def hang():
        time.sleep(3)
        seen.append((tmp_path / "stuck.txt").read_text())

    trainer, task, _, _ = make(tmp_path, first=[Watchdog(tmp_path, seconds=0.5), At({4: hang})])
    trainer.fit(task, datamodule=ToyData())
    out = capsys.readouterr().out
    assert "nothing has moved for 0:0" in out and "computing step 4 in test_guards.py" not in out
    assert "step 3" in out or "step 4" in out
    assert "in hang" in seen[0] and trainer.global_step == 12


class Hungry(nn.Linear):
    """A layer that runs out of memory above so many rows, in the forward or in the backward pass."""

    def __init__(self, limit, where):
        super().__init__(8, 1)
        self.limit, self.where, self.rows = limit, where, []

    def forward(self, x):
        self.rows += [len(x)] if self.training else []
        if len(x) > self.limit and self.where == "forward":
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        y = super().forward(x)
        if len(x) > self.limit and y.requires_grad:
            y.register_hook(self._refuse)
        return y

    def _refuse(self, gradient):
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_memory_that_runs_out_halves_the_batch_and_keeps_the_update(tmp_path, capsys, where, accumulate):
    def run(name, limit, halve):
        torch.manual_seed(0)
        task = Regression(Hungry(limit, where))
        trainer, task, _, _ = make(
            tmp_path / name,
            task=task,
            guards={"halve_batch": halve},
            max_steps=5,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
        )
        trainer.fit(task, datamodule=ToyData(batch_size=8))
        return task, [r["train/loss"] for r in read_metrics(tmp_path / name / "metrics.csv") if "train/loss" in r]

    whole, losses = run("whole", 100, False)
    halved, parts = run("halved", 3, True)
    assert halved.parts == 4 and max(halved.model.rows[-8:]) == 2
    assert capsys.readouterr().out.count("out of memory") == 2
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(losses))
    for a, b in zip(whole.parameters(), halved.parameters()):
        torch.testing.assert_close(a, b)


def test_a_single_sample_that_does_not_fit_ends_the_run(tmp_path):
    trainer, task, _, _ = make(tmp_path, task=Regression(Hungry(0, "forward")), guards={"halve_batch": True})
    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit(task, datamodule=ToyData())
    assert task.parts == 4


class Router(Regression):
    """Four experts, of which number 2 gets nothing and number 3 next to nothing."""

    def step(self, batch, training):
        self.expert_load = torch.tensor([[0.5, 0.499, 0.0, 0.001], [0.25, 0.25, 0.25, 0.25]])
        return super().step(batch, training)


def test_dead_experts_are_named_once(tmp_path, capsys):
    task = Router(nn.Linear(8, 1))
    trainer, task, _, _ = make(tmp_path, task=task, guards={"dead_experts": 4})
    trainer.fit(task, datamodule=ToyData())
    out = capsys.readouterr().out
    assert out.count("dead experts") == 1 and "MoE layer 0: 2, 3." in out and "layer 1" not in out


class Poisoned(Regression):
    """NaN at the given steps."""

    steps = ()

    def step(self, batch, training):
        out = super().step(batch, training)
        poison = training and self.trainer.global_step in self.steps and self.attempts.append(1) is None
        return StepOutput(out.loss * float("nan"), *out[1:]) if poison else out

    attempts: list = []


CLIPPING = [{}, {"gradient_clip_val": 1.0}, {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}]


@pytest.mark.parametrize("clipping", CLIPPING, ids=["none", "by norm", "by value"])
def test_nan_is_skipped_so_many_times_then_the_batch_is_dumped(tmp_path, capsys, clipping):
    task = Poisoned(nn.Linear(8, 1))
    task.steps = (3, 4, 7)
    trainer, task, _, _ = make(tmp_path, task=task, guards={"max_skips": 2}, **clipping)
    trainer.fit(task, datamodule=ToyData())
    assert capsys.readouterr().out.count("update skipped") == 3
    assert all(p.isfinite().all() for p in task.parameters())
    task = Poisoned(nn.Linear(8, 1))
    task.steps = range(3, 99)
    trainer, task, _, _ = make(tmp_path / "b", task=task, guards={"max_skips": 2}, checkpoint={"every_n_steps": 1})
    with pytest.raises(TrainingFailed, match="NaN or Inf at step 5.*bad_batch.pt"):
        trainer.fit(task, datamodule=ToyData())
    assert torch.load(tmp_path / "b/bad_batch.pt", weights_only=True)["x"].shape == (4, 8)


def test_a_spike_is_reported_with_its_step_and_batch(tmp_path, capsys):
    class Spiked(Regression):
        def step(self, batch, training):
            out = super().step(batch, training)
            return StepOutput(out.loss * (50 if self.trainer.global_step == 54 else 1), *out[1:])

    trainer, task, _, _ = make(tmp_path, task=Spiked(nn.Linear(8, 1)), max_steps=60, val_check_interval=1000)
    trainer.fit(task, datamodule=ToyData())
    assert "loss spike at step 55" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_saves_between_updates_and_stops(tmp_path, name):
    """Also in the middle of an accumulated update; what follows is what would have followed."""

    def go(folder, actions, **options):
        trainer, task, _, signals = make(
            folder, first=[At(actions)], accumulate_grad_batches=3, val_check_interval=1000, **options
        )
        checkpoint = last_good_checkpoint(folder)
        trainer.fit(task, datamodule=ToyData(), ckpt_path=checkpoint, weights_only=True)
        rows = read_metrics(folder / "metrics.csv")
        return signals.received, [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]

    _, whole = go(tmp_path / "whole", {})
    received, begun = go(tmp_path / "run", {5: lambda: os.kill(os.getpid(), getattr(signal, name))})
    assert received == name and len(begun) in (5, 6)
    assert last_good_checkpoint(tmp_path / "run").name == f"step-{len(begun):08d}"
    received, rows = go(tmp_path / "run", {})
    assert received is None and rows == whole and len(rows) == 12


def test_max_time_ends_between_updates_and_its_checkpoint_is_whole(tmp_path, capsys):
    slow = At({n: lambda: time.sleep(0.05) for n in range(100)})
    trainer, task, checkpointer, _ = make(
        tmp_path,
        first=[slow, TimeLimit({"milliseconds": 400})],
        max_steps=1000,
        accumulate_grad_batches=2,
        val_check_interval=10_000,
    )
    trainer.fit(task, datamodule=ToyData())
    assert 1 < trainer.global_step < 100 and "max_time is over at step" in capsys.readouterr().out
    folder = last_good_checkpoint(tmp_path)
    assert folder.name.startswith(f"step-{trainer.global_step:08d}")
    again, task, _, _ = make(
        tmp_path, max_steps=trainer.global_step + 2, accumulate_grad_batches=2, val_check_interval=10_000
    )
    again.fit(task, datamodule=ToyData(), ckpt_path=folder, weights_only=True)  # with more time it goes on
    assert again.global_step == trainer.global_step + 2


def test_checkpoints_are_kept_as_asked(tmp_path, monkeypatch):
    trainer, task, checkpointer, _ = make(
        tmp_path, max_steps=20, val_check_interval=4, checkpoint={"every_n_steps": 3, "keep_last": 3, "keep_best": 2}
    )
    values = iter([5.0, 1.0, 3.0, 2.0, 4.0])
    monkeypatch.setattr(checkpointer, "_value", lambda trainer: next(values))
    trainer.fit(task, datamodule=ToyData())
    index = json.loads((tmp_path / "checkpoints/index.json").read_text())
    assert index["last"] == "step-00000020" and [b["value"] for b in index["best"]] == [1.0, 2.0]
    assert [b["name"] for b in index["best"]] == ["step-00000008", "step-00000016"]
    assert index["recent"] == ["step-00000016", "step-00000018", "step-00000020"]
    on_disk = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert on_disk == ["step-00000008", "step-00000016", "step-00000018", "step-00000020"]


def test_every_n_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ssmzoo.train.checkpointer.time.monotonic", lambda: now[0])
    minute = At({n: lambda: now.__setitem__(0, now[0] + 60) for n in range(1, 13)})
    trainer, task, checkpointer, _ = make(
        tmp_path, first=[minute], val_check_interval=1000, checkpoint={"every_n_minutes": 3.5, "keep_last": 50}
    )
    trainer.fit(task, datamodule=ToyData())
    assert checkpointer.index["recent"] == ["step-00000004", "step-00000008", "step-00000012"]


def test_a_validation_within_an_update_keeps_its_weights_but_not_a_state_to_resume_from(tmp_path):
    trainer, task, checkpointer, _ = make(
        tmp_path,
        accumulate_grad_batches=3,
        val_check_interval=4,
        max_steps=3,
        checkpoint={"keep_last": 5, "keep_best": 5},
    )
    trainer.fit(task, datamodule=ToyData())
    kept = {p.name: (p / "trainer.ckpt").exists() for p in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {"step-00000001": False, "step-00000002": True, "step-00000003": True}
    assert last_good_checkpoint(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("moment", [5, 6], ids=["between validations", "at a validation"])
def test_a_stopped_run_has_the_validations_of_one_that_was_not(tmp_path, moment):
    def go(folder, actions):
        trainer, task, _, _ = make(folder, first=[At(actions)], val_check_interval=3)
        trainer.fit(task, datamodule=ToyData(), ckpt_path=last_good_checkpoint(folder), weights_only=True)
        return [row for row in read_metrics(folder / "metrics.csv") if "val/loss" in row]

    whole = go(tmp_path / "whole", {})
    go(tmp_path / "run", {moment: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert go(tmp_path / "run", {}) == whole and len(whole) == 4


def test_a_second_signal_ends_at_once_with_the_same_status(tmp_path, capsys):
    from ssmzoo.train.build import Loop, Objects
    from ssmzoo.train.run import fit

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    trainer, task, checkpointer, signals = make(tmp_path, first=[At({7: twice})], checkpoint={"every_n_steps": 3})
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        fit(Objects("toy", ToyData(), task, {}), Loop(trainer, checkpointer, signals, None), tmp_path, None)
    assert stop.value.code == 75 and "continue with: python train.py resume=" in capsys.readouterr().out
    assert (tmp_path / "status.txt").read_text().startswith("stopped")
    assert last_good_checkpoint(tmp_path).name == "step-00000006"
    signal.signal(signal.SIGTERM, before)
