"""What timm asks of every image model, once: head, checkpointing, and the four-stage flow from image to maps.

b batch, c channels, y x rows and columns, d width of a stage. Maps are channels-last (b y x d) inside a model and
(b d y x) where they leave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


class ImageBackbone(nn.Module):
    """A classifier whose `forward_features` is pooled, dropped out and mapped to classes by `head`.

    Subclasses call `init_head`, define `forward_features` and `pool`, run blocks through `run`, and list in `POOLS`
    what global_pool may be.
    """

    POOLS: tuple[str, ...] = ("avg", "max", "")
    first_conv = "patch_embed.proj"
    classifier = "head"

    def init_head(
        self, num_features: int, num_classes: int, global_pool: str, drop_rate: float, hidden_size: int | None = None
    ) -> None:
        self.num_features, self.head_hidden_size = num_features, hidden_size or num_features
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool = ""
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

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

    def run(self, block: nn.Module, *args):
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def no_weight_decay(self) -> set[str]:
        """State-space parameters and position tables; norms and biases are left out by their shape already."""
        last = (
            "A_logs",
            "A_log",
            "A_b_log",
            "Ds",
            "D",
            "D_b",
            "dt_projs_bias",
            "dt_bias",
            "pos_embed",
            "pos_embed_cls",
            "cls_token",
        )
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in last}


class Stage(nn.Module):
    """Blocks at one resolution, and the way down to the next one (None in the last stage)."""

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample


def keep_resolution(downsample: nn.Module) -> None:
    """Take the stride out of the way down between two stages; weights stay as they are."""
    strided = [m for m in downsample.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    if len(strided) != 1 or strided[0].kernel_size != (3, 3):
        raise ValueError(
            f"output_stride needs a way down by a 3x3 convolution, not {type(downsample).__name__}; leave "
            f"it out, or take a model with such convolutions (vmamba_tiny, spatial_mamba_tiny)"
        )
    strided[0].stride = (1, 1)


class FourStage(ImageBackbone):
    """Stem, stages, final norm; subclasses build `patch_embed`, `layers` (of Stage) and `norm`, then `init_stages`.

    The tap of a stage is its output before the downsampling, as in the papers' dense predictors.
    """

    def init_stages(self, dims: Sequence[int], stride: int, halves: bool = True, output_stride: int = 0) -> None:
        """halves: whether every stage halves the map; output_stride > 0: only down to 1 / output_stride of it."""
        self.dims = tuple(dims)
        strides = [stride * 2**i if halves else stride for i in range(len(dims))]
        if output_stride and output_stride != strides[-1]:
            if output_stride not in strides:
                raise ValueError(f"output_stride={output_stride}; this model has {', '.join(map(str, strides))}")
            for i in range(strides.index(output_stride), len(dims) - 1):
                keep_resolution(self.layers[i].downsample)
            strides = [min(s, output_stride) for s in strides]
        self.feature_info = [
            dict(num_chs=d, reduction=s, module=f"layers.{i}") for i, (d, s) in enumerate(zip(dims, strides))
        ]

    def stem(self, x: Tensor) -> Tensor:
        """Images (b c y x) to the first map (b y' x' d)."""
        return self.patch_embed(x)

    def descend(self, i: int, entering: Tensor, tap: Tensor) -> Tensor:
        """From stage i to the next: (b y x d) -> (b y/2 x/2 2d). `entering` is what the stage received."""
        return self.layers[i].downsample(tap)

    def stages(self, x: Tensor, stop: int | None = None) -> list[Tensor]:
        """Taps (b y x d) of the stages 0 .. stop of an image (b c y x)."""
        x, taps = self.stem(x), []
        for i, stage in enumerate(self.layers):
            entering = x
            for block in stage.blocks:
                x = self.run(block, x)
            taps.append(x)
            if i == stop or i == len(self.layers) - 1:
                break
            x = self.descend(i, entering, x)
        return taps

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(x)[-1]).permute(0, 3, 1, 2)

    def pool(self, x: Tensor) -> Tensor:
        return {"avg": lambda: x.mean((2, 3)), "max": lambda: x.amax((2, 3)), "": lambda: x}[self.global_pool]()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """The taps asked for, and the final features in front of them unless `intermediates_only`.

        norm  apply the final norm to the last stage's tap | stop_early  do not run stages behind the last tap
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken = take_indices(len(self.feature_info), indices)
        taps = self.stages(x, stop=max(taken) if stop_early else None)
        final = self.norm(taps[-1]) if len(taps) == len(self.feature_info) else taps[-1]
        maps = [final if norm and i == len(self.feature_info) - 1 else taps[i] for i in taken]
        if output_fmt == "NCHW":
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return maps if intermediates_only else (final.permute(0, 3, 1, 2), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what no tap needs; the indices that remain are returned."""
        taken = take_indices(len(self.feature_info), indices)
        self.layers = self.layers[: max(taken) + 1]
        self.layers[-1].downsample = None
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layer decay: the stem, then every block (stage if coarse) in order, each with the way down behind it."""
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


class FeaturePyramid(nn.Module):
    """Maps of a four-stage backbone for dense heads: taps before downsampling, each through a norm of its own.

    backbone     its final norm and head are removed
    out_indices  stages, from 0
    out_norm     a fresh norm per tap (`outnorm{i}`), of the backbone's kind; no part of classification checkpoints
    forward      (b c y x) -> list of (b d_i y_i x_i)
    """

    def __init__(self, backbone: FourStage, out_indices: Sequence[int] = (0, 1, 2, 3), out_norm: str | None = "ln"):
        super().__init__()
        from ssmzoo.layers.image.patch_embed import map_norm

        self.out_indices = backbone.prune_intermediate_layers(list(out_indices), prune_norm=True)
        self.backbone = backbone
        for i in self.out_indices:
            self.add_module(f"outnorm{i}", map_norm(out_norm, backbone.dims[i]) if out_norm else nn.Identity())

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = self.backbone.stages(x)
        return [self.get_submodule(f"outnorm{i}")(taps[i]).permute(0, 3, 1, 2) for i in self.out_indices]
