"""What several tests share: a small run of the shared loop (a linear model on vectors), a check of any model."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn

from ssmzoo.data.loader import ResumableLoader
from ssmzoo.tasks.base import StepOutput, Task
from ssmzoo.train.callbacks import RandomStates, StopOnSignal
from ssmzoo.train.checkpoint import FolderCheckpointIO
from ssmzoo.train.checkpointer import Checkpointer
from ssmzoo.train.guards import Guards
from ssmzoo.train.logger import CSVFile
from ssmzoo.train.rows import Rows

# a run of four steps on bits, by the words of a command line
TINY = [
    "model=lstm",
    "data.batch_size=8",
    "data.val_samples=4",
    "data.test_length=20",
    "data.test_samples=2",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
]


class Vectors(torch.utils.data.Dataset):
    """32 vectors and their sums."""

    def __len__(self):
        return 32

    def __getitem__(self, draw):
        x = torch.randn(8, generator=torch.Generator().manual_seed(draw.index))
        return {"x": x, "y": x.sum()}


class Regression(Task):
    def step(self, batch, training):
        return StepOutput((self.model(batch["x"]).squeeze(-1) - batch["y"]).square().mean(), {}, len(batch["x"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=1e-5)


class ToyData(L.LightningDataModule):
    def __init__(self, num_workers=0, batch_size=4):
        super().__init__()
        self.loader = ResumableLoader(Vectors(), batch_size, shuffle=True, num_workers=num_workers)

    def train_dataloader(self):
        return self.loader

    def val_dataloader(self):
        return ResumableLoader(Vectors(), 8)


class At(L.Callback):
    """Call a function after the given steps: `At({5: fill_the_disk})`."""

    def __init__(self, actions):
        self.actions = actions

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step in self.actions:
            self.actions.pop(trainer.global_step)()


def make(run, *, task=None, width=4, first=(), guards=None, checkpoint=None, **trainer):
    """(trainer, task, checkpointer, signals); callbacks in `first` come before the checkpointer."""
    torch.manual_seed(0)
    if task is None:
        task = Regression(nn.Sequential(nn.Linear(8, width), nn.Linear(width, 1)))
    checkpointer = Checkpointer(run / "checkpoints", "loss", "min", **(checkpoint or {}))
    signals = StopOnSignal(checkpointer)
    settings = {"max_steps": 12, "val_check_interval": 6, "log_every_n_steps": 1} | trainer
    run.mkdir(parents=True, exist_ok=True)
    built = L.Trainer(
        **settings,
        accelerator="cpu",
        devices=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[RandomStates(), Guards(run, **(guards or {})), *first, Rows(run), checkpointer, signals],
        logger=[CSVFile(run / "metrics.csv")],
        plugins=[FolderCheckpointIO(lambda: {"model": "toy", "config": {}})],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(run),
    )
    return built, task, checkpointer, signals


def assert_checkpointing_changes_nothing(model, loss, **tolerance):
    """The gradients of `loss()` are the same whether the model keeps its activations or computes them again."""
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)  # the same paths are dropped
        loss().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, **tolerance)
