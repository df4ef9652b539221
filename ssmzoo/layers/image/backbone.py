"""What timm asks of every image model, answered from a model's attributes; nothing has to be called in any order.

A model's file shows its way from pixels to logits: `forward`, `forward_features`, `forward_head`. It inherits the rest.

b batch, c channels, y x rows and columns, d width of a stage. Maps are channels-last (b y x d) inside a model and
(b d y x) where they leave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmzoo.layers.image.patch_embed import map_norm
from ssmzoo.layers.roles import named_role


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Which of `count` features: None all, n the last n, a list by number (negative from the end). timm's rule."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"indices={indices}: the model has {count} features")
        return list(range(count - indices, count))
    taken = [i if i >= 0 else count + i for i in indices]
    if any(not 0 <= i < count for i in taken):
        raise ValueError(f"indices={list(indices)}: the model has features 0 to {count - 1}")
    return taken


def recomputed(enabled: bool, block: nn.Module, *args):
    """block(*args); if enabled, its activations are computed anew in the backward pass instead of being kept."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


class ImageBackbone(nn.Module):
    """A classifier with a linear `head` behind pooled features.

    A subclass sets `num_features` (channels of what `forward_features` returns), `feature_info` (timm's list) and
    `head_drop`, calls `reset_classifier` once, and defines forward_features(x) and forward_head(x, pre_logits=False).
    POOLS lists what global_pool may be.
    """

    POOLS: tuple[str, ...] = ("avg", "max", "")
    first_conv = "patch_embed.proj"
    classifier = "head"
    global_pool = ""
    grad_checkpointing = False

    @property
    def head_hidden_size(self) -> int:
        """Width of the vector that the head classifies."""
        return self.num_features

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh linear head (std 0.02) for `num_classes`, none for 0; `global_pool` is kept unless given."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in self.POOLS:
            known = ", ".join(map(repr, self.POOLS))
            raise ValueError(f"global_pool={global_pool!r}: {type(self).__name__} takes {known}")
        if num_classes > 0 and global_pool == "":
            raise ValueError("global_pool='' leaves nothing to classify: use it together with num_classes=0")
        like = next(self.parameters(), torch.empty(0))
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """State-space parameters, biases and position tables; timm leaves out norms by their shape."""
        return {name for name, _ in self.named_parameters() if named_role(name)}


class Stage(nn.Module):
    """Blocks at one resolution, (b y x d) -> (b y x d), and the downsampling that follows (None in the last stage)."""

    grad_checkpointing = False

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = recomputed(True, block, x) if self.grad_checkpointing and self.training else block(x)
        return x


def keep_resolution(downsample: nn.Module) -> None:
    """Make a downsampling change the width only; weights stay as they are."""
    strided = [m for m in downsample.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    if len(strided) != 1 or strided[0].kernel_size != (3, 3):
        raise ValueError(
            f"output_stride needs a downsampling by a 3x3 convolution, not {type(downsample).__name__}; leave "
            f"it out, or take a model with such convolutions (vmamba_tiny, spatial_mamba_tiny)"
        )
    strided[0].stride = (1, 1)


def pool_map(x: Tensor, kind: str) -> Tensor:
    """(b d y x) -> (b d) by "avg" or "max", as it is for ""."""
    if kind == "avg":
        return x.mean((2, 3))
    return x.amax((2, 3)) if kind == "max" else x


class FourStage(ImageBackbone):
    """Stem, stages at falling resolutions, final norm. Features for dense prediction: maps before the downsampling.

    A subclass sets `dims` (width of every stage), `patch_embed`, `layers` (of `Stage`), `norm` and
    `feature_info` (`stage_info`), and defines `forward_stages(x (b c y x), stop=None) -> list of (b y x d)`,
    the maps of the first `stop` stages.
    """

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The maps of the stages asked for, and the final features in front of them unless `intermediates_only`.

        norm  apply the final norm to the last stage's map | stop_early  do not run the stages behind the last one asked
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken, last = take_indices(len(self.feature_info), indices), len(self.feature_info) - 1
        maps = self.forward_stages(x, stop=max(taken) + 1 if stop_early else None)
        final = self.norm(maps[-1]) if len(maps) > last else maps[-1]
        maps = [final if norm and i == last else maps[i] for i in taken]
        if output_fmt == "NCHW":
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return maps if intermediates_only else (final.permute(0, 3, 1, 2), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what no feature asked for needs; the indices that remain are returned."""
        taken = take_indices(len(self.feature_info), indices)
        self.layers = self.layers[: max(taken) + 1]
        self.layers[-1].downsample = None
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer decay: the stem, then every block (stage if coarse) in order, each with the downsampling behind it."""
        blocks = (
            r"^layers\.(\d+)"
            if coarse
            else [
                (r"^layers\.(\d+)\.downsample", (99,)),
                (r"^layers\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ]
        )
        return dict(stem=r"^(?:patch_embed|pos_embed)", blocks=blocks)


def stage_info(
    layers: Sequence[Stage], dims: Sequence[int], stride: int, halves: bool = True, output_stride: int = 0
) -> list[dict]:
    """timm's `feature_info` of stages behind a stem of `stride`; downsamplings beyond output_stride lose their stride.

    halves  whether every downsampling halves the map | output_stride  0: as the stages make it
    """
    strides = [stride * 2**i if halves else stride for i in range(len(dims))]
    if output_stride and output_stride != strides[-1]:
        if output_stride not in strides:
            raise ValueError(f"output_stride={output_stride}; this model has {', '.join(map(str, strides))}")
        for i in range(strides.index(output_stride), len(dims) - 1):
            keep_resolution(layers[i].downsample)
        strides = [min(s, output_stride) for s in strides]
    return [dict(num_chs=d, reduction=s, module=f"layers.{i}") for i, (d, s) in enumerate(zip(dims, strides))]


class FeaturePyramid(nn.Module):
    """Maps of a four-stage backbone for dense heads, before downsampling, each through a norm of its own.

    backbone     its final norm and head are removed
    out_indices  stages, from 0
    out_norm     a fresh norm per map (`outnorm{i}`), of the backbone's kind; no part of classification checkpoints
    forward      (b c y x) -> list of (b d_i y_i x_i)
    """

    def __init__(self, backbone: FourStage, out_indices: Sequence[int] = (0, 1, 2, 3), out_norm: str | None = "ln"):
        super().__init__()
        self.out_indices = backbone.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.backbone = backbone
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", map_norm(out_norm, backbone.dims[i]) if out_norm else nn.Identity())

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone.forward_stages(x)
        return [self.get_submodule(f"outnorm{i}")(maps[i]).permute(0, 3, 1, 2) for i in self.out_indices]
