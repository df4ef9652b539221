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
        return above and below and math.isfinite(value)

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
COUNT, AT_LEAST_0, OR_NEVER = Range(1), Range(0), Range(0, also=(math.inf,))
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
    "trainer.devices": Range(0, also=(-1,)),  # numbers of GPUs among them: see _are_devices
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
    "trainer.gradient_clip_val": OR_NEVER,
    "trainer.reload_dataloaders_every_n_epochs": AT_LEAST_0,
    "callbacks.checkpoint.every_n_steps": AT_LEAST_0,
    "callbacks.checkpoint.every_n_minutes": OR_NEVER,
    "callbacks.checkpoint.keep_best": AT_LEAST_0,
    "callbacks.checkpoint.keep_last": COUNT,
    "callbacks.guards.max_skips": AT_LEAST_0,
    "callbacks.guards.spike": OR_NEVER,
    "callbacks.guards.dead_experts": AT_LEAST_0,
    "callbacks.watchdog.seconds": OR_NEVER,
    "callbacks.profile.steps": COUNT,
    "callbacks.profile.after": AT_LEAST_0,
    "callbacks.progress.every_seconds": OR_NEVER,
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
    "data.selection.share": PROPER_SHARE,
    "data.selection.length": Range(200, 16_000),
    "data.image_size": COUNT,
    "data.in_chans": COUNT,
    "data.crop_pct": Range(0, 1, "low"),
    "data.augment.scale": POSITIVE,
    "data.augment.resize": COUNT,
    "data.augment.crop": COUNT,
    "data.augment.max_share": Range(0, 1, "low"),
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
    "data.max_freqs": COUNT,
    "data.walk_steps": COUNT,
    "data.nodes": Range(3),
    "data.distractors": SHARE,
    "data.legs": Range(2),
    "data.num_classes": Range(2),
    "data.epoch_graphs": COUNT,
    "data.bpe_vocab_size": Range(257),  # the 256 bytes and one pair
    "data.seq_len": COUNT,
    "data.val_tokens": COUNT,
    "data.val_rows": COUNT,
    "data.shortest": COUNT,
    "data.window": Range(2),
    "data.stride": COUNT,
    "data.score_stride": COUNT,
    "data.test_fraction": PROPER_SHARE,
    "data.per_kind": COUNT,
    "data.clips": COUNT,
    "data.val_clips": COUNT,
    "data.clip_frames": COUNT,
    "data.speakers": Range(1, 25),
    "data.frames": Range(8),
    "data.classes": Range(2),
    "data.patch": COUNT,
    "data.channels": Range(1, 3),
    "data.ignore": Range(0, 65535),  # ids of 16 bits at most
    "data.train_scenes": COUNT,
    "data.val_scenes": COUNT,
    "data.val_size": COUNT,
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
    "task.long_snap": AT_LEAST_0,
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
    "task.channels": COUNT,
    "task.auxiliary": AT_LEAST_0,  # channels; 0: no auxiliary head
    "task.auxiliary_weight": AT_LEAST_0,
    "task.drop_rate": Range(0, 1, "high"),
    "task.out_indices": AT_LEAST_0,
    "task.slide": COUNT,
    "task.scales": POSITIVE,
    "task.min_stride": COUNT,
    "task.extra_levels": AT_LEAST_0,
    "task.anchor_scale": POSITIVE,
    "task.min_size": COUNT,
    "task.max_size": COUNT,
    "task.results": AT_LEAST_0,  # thresholds and numbers of boxes
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
    "task.k": AT_LEAST_0,
    "task.temperature": AT_LEAST_0,
    "task.ratio": Range(0, 100, "low high"),
    "task.vus_window": AT_LEAST_0,
    "task.codes_steps": AT_LEAST_0,
    "task.free_steps": AT_LEAST_0,
    "task.codes_lr": POSITIVE,
    "task.decoder_steps": AT_LEAST_0,
    "task.decoder_lr": POSITIVE,
    "task.decoder_batch": COUNT,
    "task.align_steps": AT_LEAST_0,
    "task.reconstruct": AT_LEAST_0,
}


def _named(expected: Range, names: str) -> dict[str, Range]:
    return dict.fromkeys(names.split(), expected)


MODEL: dict[str, Range] = {  # by the last part of a key below model.; of others a whole number is at least 0
    **_named(
        COUNT, "d_model d_state d_expert d_retrieval d_ssm embed_dim embed_size dim dims head_dim headdim state_size"
    ),
    **_named(
        COUNT,
        "feature_dim key_dim value_dim inner_rank mimo_rank input_size vocab_size in_chans inp_channels",
    ),
    **_named(COUNT, "out_channels img_size patch_size stride window window_size chunk_size conv_size upscale"),
    **_named(COUNT, "n_layer n_blocks num_layers depth depths num_blocks num_refinement_blocks num_layers_new"),
    **_named(COUNT, "n_heads n_kv_heads num_heads num_heads_kv num_v_heads expert_heads experts_per_head ngroups"),
    **_named(COUNT, "attn_every moe_every top_k n1 n2 n_slots num_tokens num_transition_matrices cls_reduce"),
    **_named(COUNT, "visual_dim rank lora_rank"),
    **_named(COUNT, "enc_in e_layers block_size frames audio_dim motion_dim words width codes n_layers lower_layers"),
    **_named(COUNT, "squeeze_factor convffn_kernel_size pad_vocab_size_multiple parameters pos_embed mlp_size"),
    **_named(AT_LEAST_0, "d_conv d_ff d_intermediate mlp_dim mlp_ratio ssm_ratio n_experts n_positions n_registers"),
    **_named(AT_LEAST_0, "num_classes output_stride attn_layer_idx rotary_emb_dim eps norm_eps init_noise"),
    **_named(AT_LEAST_0, "balance_weight z_loss_weight penalty_weight state_penalty state_cap dt_init_floor"),
    "dt_limit": OR_NEVER,
    **_named(POSITIVE, "alpha capacity_factor eval_capacity_factor expand expand_v conv_expand gate_temperature tau"),
    **_named(POSITIVE, "img_range p_norm rope_base scale_eigv dt_min dt_max dt_scale A_init_range"),
    **_named(SHARE, "shuffle_rate rope_fraction"),
    "max_share": Range(0, 1, "low"),
    **_named(Range(0, 1, "high"), "drop_path_rate drop_rate dropout mask_ratio"),
}
CHECKED = ("trainer", "optim", "callbacks", "data", "task", "model", "seed", "n_trials")


def numbers(value: Any) -> Iterator[float]:
    """The numbers in a plain value: a number, a list of some, a table of some."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, dict):
        yield from numbers(list(value.values()))


def _leaves(key: str, node: Any) -> Iterator[tuple[str, Any]]:
    """(key, value) of everything in nested tables."""
    if not isinstance(node, dict):
        yield key, node
        return
    for name, value in node.items():
        yield from _leaves(f"{key}.{name}", value)


def out_of_range(plain: dict[str, Any]) -> tuple[str, float, str] | None:
    """(key, value, what was expected) of the first number of a plain configuration that cannot work."""
    for key, expected in RANGES.items():
        node: Any = plain
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        for value in numbers(node):
            if not expected.holds(value):
                return key, value, str(expected)
    for key, value in _leaves("model", plain.get("model") or {}):
        for number in numbers(value):
            expected = MODEL.get(key.rpartition(".")[2], AT_LEAST_0 if isinstance(number, int) else ANY)
            if not expected.holds(number):
                return key, number, str(expected)
    trainer = plain.get("trainer") or {}
    if not _is_time(limit := trainer.get("max_time")):
        return "trainer.max_time", limit, "days:hours:minutes:seconds such as 00:01:30:00, above zero"
    if not _are_devices(devices := trainer.get("devices")):
        return "trainer.devices", devices, "auto, a number of at least 1 (or -1 for all), or the numbers of GPUs"
    return None


def _is_time(limit: Any) -> bool:
    """None, days:hours:minutes:seconds, or a table of such parts; never nothing at all."""
    if isinstance(limit, str):
        return re.fullmatch(r"\d+(:\d+){3}", limit.strip()) is not None and any(map(int, limit.split(":")))
    if isinstance(limit, dict):
        parts = limit.keys() <= {"weeks", "days", "hours", "minutes", "seconds"}
        whole = list(numbers(limit))
        return parts and len(whole) == len(limit) and min(whole, default=0) >= 0 and 0 < sum(whole) < math.inf
    return limit is None


def _are_devices(devices: Any) -> bool:
    """As Lightning's Trainer takes them."""
    if isinstance(devices, str):
        return re.fullmatch(r"\s*(auto|-1|[1-9]\d*|\d+(\s*,\s*\d+)+\s*,?)\s*", devices) is not None
    if isinstance(devices, (list, tuple)):
        return bool(devices) and all(type(d) is int and d >= 0 for d in devices)
    return devices is None or (type(devices) is int and (devices >= 1 or devices == -1))
