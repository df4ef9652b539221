"""Which numbers a configuration may hold: checked before anything is built or written."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers from `low` to `high`, ends included but for the `open` ones, and the single values in `also`."""

    low: float
    high: float = math.inf
    open: str = ""  # "low", "high" or "low high"
    also: tuple = ()
    text: str = ""  # what a message says is expected, where the ends do not say it

    def holds(self, value: float) -> bool:
        if value in self.also and not isinstance(value, bool):
            return True
        above = value > self.low if "low" in self.open else value >= self.low
        below = value < self.high if "high" in self.open else value <= self.high
        return above and below and (math.isfinite(value) or value == self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if "low" in self.open else f"at least {self.low:g}"
        high = "" if self.high == math.inf else f"{'below' if 'high' in self.open else 'at most'} {self.high:g}"
        also = "".join(f" (or {v})" for v in self.also)
        return self.text or " and ".join(part for part in (low, high) if part) + also


class Batches(NamedTuple):
    """How many batches: a whole number from `least` on, or a share of them in (0, 1]."""

    least: int

    def holds(self, value: float) -> bool:
        return value >= self.least if isinstance(value, int) else 0.0 <= value <= 1.0 and (value > 0 or not self.least)

    def __str__(self) -> str:
        return f"a whole number of at least {self.least}, or a share between 0 and 1"


ANY = Range(-math.inf, text="a number")
COUNT, AT_LEAST_0 = Range(1), Range(0)
POSITIVE, SHARE, PROPER_SHARE = Range(0, open="low"), Range(0, 1), Range(0, 1, "low high")
SEED = Range(0, 2**32 - 1)

RANGES: dict[str, Range | Batches] = {
    "seed": SEED,
    "n_trials": COUNT,
    "optim.lr": AT_LEAST_0,
    "optim.adamw_lr": AT_LEAST_0,
    "optim.weight_decay": AT_LEAST_0,
    "optim.betas": Range(0, 1, "high"),
    "optim.eps": AT_LEAST_0,
    "optim.warmup_steps": AT_LEAST_0,
    "optim.hold_steps": AT_LEAST_0,
    "optim.cooldown_steps": AT_LEAST_0,
    "optim.stair_steps": COUNT,
    "optim.milestones": AT_LEAST_0,
    "optim.min_lr_ratio": SHARE,
    "optim.warmup_lr_ratio": AT_LEAST_0,
    "optim.gamma": POSITIVE,
    "optim.layer_decay": Range(0, 1, "low"),
    "optim.lr_scale": AT_LEAST_0,
    "trainer.devices": Range(1, also=(-1,)),
    "trainer.num_nodes": COUNT,
    "trainer.fast_dev_run": AT_LEAST_0,
    "trainer.max_epochs": Range(1, also=(-1,)),
    "trainer.min_epochs": AT_LEAST_0,
    "trainer.max_steps": Range(1, also=(-1,), text="positive (or -1 with max_epochs or max_time)"),
    "trainer.min_steps": AT_LEAST_0,
    "trainer.limit_train_batches": Batches(1),
    "trainer.limit_val_batches": Batches(0),
    "trainer.limit_test_batches": Batches(0),
    "trainer.limit_predict_batches": Batches(0),
    "trainer.overfit_batches": Batches(0),
    "trainer.val_check_interval": Batches(1),
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.num_sanity_val_steps": Range(0, also=(-1,)),
    "trainer.log_every_n_steps": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": AT_LEAST_0,
    "trainer.reload_dataloaders_every_n_epochs": AT_LEAST_0,
    "callbacks.checkpoint.every_n_steps": AT_LEAST_0,
    "callbacks.checkpoint.every_n_minutes": AT_LEAST_0,
    "callbacks.checkpoint.keep_best": AT_LEAST_0,
    "callbacks.checkpoint.keep_last": COUNT,
    "callbacks.guards.max_skips": AT_LEAST_0,
    "callbacks.guards.spike": AT_LEAST_0,
    "callbacks.guards.dead_experts": AT_LEAST_0,
    "callbacks.watchdog.seconds": AT_LEAST_0,
    "callbacks.profile.steps": COUNT,
    "callbacks.profile.after": AT_LEAST_0,
    "callbacks.progress.every_seconds": AT_LEAST_0,
    "callbacks.ema.decay": Range(0, 1, "high"),
    "callbacks.ema.device": AT_LEAST_0,  # the number of a GPU
    "callbacks.ema.update_every_n_steps": COUNT,
    "callbacks.ema.update_starting_at_step": AT_LEAST_0,
    "callbacks.ema.update_starting_at_epoch": AT_LEAST_0,
    "callbacks.early_stopping.min_delta": AT_LEAST_0,
    "callbacks.early_stopping.patience": AT_LEAST_0,
    "callbacks.early_stopping.stopping_threshold": ANY,
    "callbacks.early_stopping.divergence_threshold": ANY,
    "data.batch_size": COUNT,
    "data.num_workers": AT_LEAST_0,
    "data.seed": SEED,
    "data.split_seed": SEED,
    "data.min_length": COUNT,
    "data.max_length": COUNT,
    "data.val_max_length": COUNT,
    "data.curriculum_steps": COUNT,
    "data.skewed": SHARE,
    "data.held_out": Range(0, 0.5),
    "data.val_samples": COUNT,
    "data.test_length": COUNT,
    "data.test_lengths": COUNT,
    "data.test_samples": COUNT,
    "data.num_samples": COUNT,
    "data.val_fraction": PROPER_SHARE,
    "data.image_size": COUNT,
    "data.in_chans": COUNT,
    "data.crop_pct": Range(0, 1, "low"),
    "data.augment.scale": POSITIVE,
    "data.augment.ratio": POSITIVE,
    "data.augment.hflip": SHARE,
    "data.augment.vflip": SHARE,
    "data.augment.color_jitter": AT_LEAST_0,
    "data.augment.re_prob": SHARE,
    "data.augment.re_count": COUNT,
    "data.vocab_size": COUNT,
    "data.train": COUNT,  # lengths and pairs
    "data.test": COUNT,
    "data.power": POSITIVE,
    "data.updates": AT_LEAST_0,
    "data.repeats": COUNT,
    "data.base_classes": COUNT,
    "data.way": COUNT,
    "data.shot": COUNT,
    "data.scale": COUNT,
    "data.sigma": Range(0, 255),
    "data.quality": Range(1, 100),
    "data.patch_size": COUNT,
    "data.patch_schedule": COUNT,
    "data.val_crop": COUNT,
    "data.holdout": COUNT,
    "data.bpe_vocab_size": Range(257),  # the 256 bytes and one pair
    "data.seq_len": COUNT,
    "data.val_tokens": COUNT,
    "data.val_rows": COUNT,
    "data.shortest": COUNT,
    "lora.rank": COUNT,
    "lora.alpha": Range(0, open="low"),
    "task.label_smoothing": SHARE,
    "task.mixup": AT_LEAST_0,
    "task.cutmix": AT_LEAST_0,
    "task.mix_prob": SHARE,
    "task.switch_prob": SHARE,
    "task.mesa": AT_LEAST_0,
    "task.mesa_start": SHARE,
    "task.mesa_decay": SHARE,
    "task.num_classes": Range(2),
    "task.consistency": AT_LEAST_0,
    "task.long_rows": COUNT,
    "task.long_length": AT_LEAST_0,
    "task.long_chunk": COUNT,
    "task.lr": POSITIVE,
    "task.old_lr": AT_LEAST_0,
    "task.steps": COUNT,
    "task.batch_size": COUNT,
    "task.copy": AT_LEAST_0,
    "task.base_copy": AT_LEAST_0,
    "task.weight_supp": AT_LEAST_0,
    "task.weight_supp_novel": AT_LEAST_0,
    "task.weight_sep": AT_LEAST_0,
    "task.weight_sep_new": AT_LEAST_0,
    "task.base_mixup": AT_LEAST_0,
    "task.base_cutmix": AT_LEAST_0,
    "task.base_mix_prob": SHARE,
    "task.keep_tokens": Range(0, 1, "low"),
    "task.sample_tokens": AT_LEAST_0,
    "task.prefix": COUNT,
    "task.mlm_weight": AT_LEAST_0,
    "task.mlm_probability": SHARE,
    "task.mask_token": AT_LEAST_0,
    "task.prompt_tokens": COUNT,
    "task.eval_lengths": COUNT,
    "task.crop_border": AT_LEAST_0,
    "task.sigma": Range(0, 255),
    "task.tile": COUNT,
}
CHECKED = ("trainer", "optim", "callbacks", "data", "task", "seed", "n_trials")  # model: by its constructor


def numbers(value: Any) -> Iterator[float]:
    """The numbers in a plain value: a number, a list of some, a table of some."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, dict):
        yield from numbers(list(value.values()))


def out_of_range(plain: dict[str, Any]) -> tuple[str, float, str] | None:
    """(key, value, what was expected) of the first number of a plain configuration that cannot work."""
    for key, expected in RANGES.items():
        node: Any = plain
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        for value in numbers(node):
            if not expected.holds(value):
                return key, value, str(expected)
    limit = (plain.get("trainer") or {}).get("max_time")
    if isinstance(limit, str) and not re.fullmatch(r"\d+(:\d+){3}", limit.strip()):
        return "trainer.max_time", limit, "days:hours:minutes:seconds such as 00:01:30:00"
    return None
