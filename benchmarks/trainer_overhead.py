"""Cost of the trainer over a bare PyTorch loop: same model, data, optimiser and schedule, alternating in one process.

    OMP_NUM_THREADS=1 python benchmarks/trainer_overhead.py moe_mamba rnn sd_ssm

CPU time (time.process_time) of blocks of steps: a callback stops the trainer's clock every BLOCK steps and runs as many
bare steps with a copy of the model. The trainer runs as `python train.py model=NAME` would: all callbacks, guards,
metrics.csv, a line of progress; validation and checkpoints are left out (they are work, not overhead). The bare loop is
what a user would write: batch, loss, backward, clipping, optimiser, schedule.
Blocks are short, so that a change of the machine's speed meets both sides of a pair.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from ssmzoo._torchvision import make_importable

make_importable()
import lightning as L  # noqa: E402


def bare_loss(task, batch: dict) -> torch.Tensor:
    """The task's training loss without its metrics."""
    from ssmzoo.tasks.formal import consistency
    from ssmzoo.tasks.language import token_cross_entropy

    if type(task).__name__ == "LanguageModeling":
        out = task.model(batch["input_ids"], seq_idx=batch["seq_idx"])
        loss, _ = token_cross_entropy(out.logits, batch["labels"])
    elif type(task).__name__ == "FormalLanguage":
        out = task.model(batch["input_ids"], None, **({"mask": batch["mask"]} if "mask" in batch else {}))
        asked = batch["labels"] != -100
        logits, labels = out.logits[..., : task.num_classes][asked], batch["labels"][asked]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        if task.consistency:
            loss = loss + task.consistency * consistency(logits, labels, task.num_classes)
    else:
        return task.step(batch, training=True).loss
    return loss + sum(v for k, v in out.aux.items() if k.endswith("_loss"))


class Bare:
    """A plain training loop that can be run some steps at a time."""

    def __init__(self, task, data, clip: float):
        self.task, self.loader, self.clip = copy.deepcopy(task), data.train_dataloader(), clip
        found = self.task.optim(self.task.model)
        self.optimizer, self.scheduler = found["optimizer"], found["lr_scheduler"]["scheduler"]
        self.parameters = list(self.task.model.parameters())
        self.batches = self.endless()

    def endless(self):
        while True:
            yield from self.loader

    def run(self, steps: int) -> None:
        self.task.train()
        for _ in range(steps):
            loss = bare_loss(self.task, next(self.batches))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.step()
            self.scheduler.step()


class Alternating(L.Callback):
    """CPU seconds per block of the trainer and of the bare loop."""

    def __init__(self, bare: Bare, block: int):
        self.bare, self.block, self.steps = bare, block, 0
        self.trainer_times, self.bare_times, self.since = [], [], None

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
        self.steps += 1
        if self.steps % self.block:
            return
        now = time.process_time()
        if self.since is not None:
            self.trainer_times.append(now - self.since)
        self.bare.run(self.block)
        if self.since is not None:
            self.bare_times.append(time.process_time() - now)
        self.since = time.process_time()


def measure(model: str, block: int, blocks: int, overrides: list[str]) -> tuple[float, float, float]:
    """(CPU ms per step of the bare loop, of the trainer, overhead in percent: median over pairs of blocks)."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from ssmzoo.presets import config_dir
    from ssmzoo.train.build import build, build_loop
    from ssmzoo.train.config import register_resolvers
    from ssmzoo.train.freed_memory import keep_freed_memory
    from ssmzoo.train.quiet import quiet

    register_resolvers()
    quiet()
    keep_freed_memory()
    steps = block * (blocks + 1)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "train",
            [
                f"model={model}",
                f"trainer.max_steps={steps}",
                "trainer.limit_val_batches=0",
                "trainer.accelerator=cpu",
                "callbacks.checkpoint.every_n_minutes=0",
                *overrides,
            ],
        )
    OmegaConf.update(cfg, "model_name", model, force_add=True)
    with tempfile.TemporaryDirectory() as folder:
        run = build(cfg)
        alternating = Alternating(Bare(run.task, run.data, run.plain["trainer"]["gradient_clip_val"]), block)
        trainer = build_loop(run, Path(folder)).trainer
        trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "Checkpointer"] + [alternating]
        gc.collect()
        trainer.fit(run.task, datamodule=run.data)
    ratios = [t / b for t, b in zip(alternating.trainer_times, alternating.bare_times)]
    per_step = [
        1000 * statistics.median(times) / block for times in (alternating.bare_times, alternating.trainer_times)
    ]
    return per_step[0], per_step[1], 100 * (statistics.median(ratios) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["moe_mamba", "rnn", "sd_ssm"])
    parser.add_argument("--block", type=int, default=0, help="steps per block; 0: as many as share a row of the log")
    parser.add_argument("--blocks", type=int, default=0, help="pairs of blocks; 0: 60, or 12 of a large model")
    args, overrides = parser.parse_known_args()
    models = [m for m in args.models if "=" not in m]
    overrides += [m for m in args.models if "=" in m]
    threads = torch.get_num_threads()
    print(f"{'model':<14}{'bare ms':>9}{'trainer ms':>12}{'overhead':>10}   CPU time per step, {threads} thread(s)")
    for model in models:
        small = model in ("sd_ssm", "rnn", "lstm", "complex_diagonal_ssm")
        with torch.random.fork_rng():
            bare, trained, percent = measure(
                model, args.block or (25 if small else 5), args.blocks or (60 if small else 12), overrides
            )
        print(f"{model:<14}{bare:>9.2f}{trained:>12.2f}{percent:>9.1f}%", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
