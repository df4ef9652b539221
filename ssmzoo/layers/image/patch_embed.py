"""Images into maps of patches, and the checks an image has to pass. b batch, c image channels, y x rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F


def check_image(x: Tensor, in_chans: int, smallest: int, model: str) -> None:
    """ValueError unless x is (b in_chans y x) of floats with both sides at least `smallest` pixels."""
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(
            f"{model} depends on the size of its images, which torch.fx's symbolic tracing (create_feature_extractor "
            f"of timm) cannot follow; take features_only=True or forward_intermediates, or torch.export for a graph"
        )
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"{model} takes images of shape (batch, {in_chans}, height, width), got {tuple(x.shape)}"
            + (f"; build it with in_chans={x.shape[1]}" if x.ndim == 4 else "")
        )
    if not x.is_floating_point():
        raise ValueError(
            f"{model} takes normalised images as floats, got {str(x.dtype).removeprefix('torch.')}; for "
            f"levels in 0 to 255: (x / 255 - mean) / std"
        )
    if min(x.shape[2:]) < smallest:
        raise ValueError(
            f"an image of {x.shape[2]}x{x.shape[3]} pixels is too small for {model}: both sides must be "
            f"at least {smallest}; enlarge the images or choose a smaller patch_size"
        )


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size given as one number or a pair. Raises ValueError for anything else."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"an image size is a number of pixels or (height, width), got {size!r}")
    return sides


class MapBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d of channels-last maps (b y x d)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def map_norm(kind: str, dim: int, eps: float = 1e-5) -> nn.Module:
    """A normalisation of channels-last maps (b y x d): 'ln' over channels at every position, 'bn' over the batch."""
    if kind not in ("ln", "bn"):
        raise ValueError(f"unknown normalisation {kind!r}; expected 'ln' or 'bn'")
    return nn.LayerNorm(dim, eps=eps) if kind == "ln" else MapBatchNorm(dim, eps=eps)


class PatchEmbed(nn.Module):
    """Images (b c y x) to channels-last maps (b y' x' d), one convolution: y' = (y - patch_size) // stride + 1.

    stride  the patch size unless given; smaller, and the patches overlap
    norm    applied to the map, or None
    """

    def __init__(
        self, patch_size: int, in_chans: int, embed_dim: int, stride: int | None = None, norm: nn.Module | None = None
    ):
        super().__init__()
        self.in_chans, self.patch_size, self.stride = in_chans, patch_size, stride or patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, self.stride)
        self.norm = norm if norm is not None else nn.Identity()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        return tuple((side - self.patch_size) // self.stride + 1 for side in (height, width))

    def forward(self, x: Tensor) -> Tensor:
        check_image(x, self.in_chans, self.patch_size, f"a model with patches of {self.patch_size} pixels")
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def resize_map(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Positions (1 y x d) for another grid, bicubic without aligned corners."""
    if tuple(table.shape[1:3]) == tuple(size):
        return table
    resized = F.interpolate(table.permute(0, 3, 1, 2).float(), size=size, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).to(table.dtype)
