"""From a backbone to the list of maps that heads for dense prediction read, coarser and coarser.

    pyramid backbones   the map behind every stage, before its downsampling, through a fresh norm (outnorm{i})
    plain backbones     equal maps of some blocks, rescaled (`SimplePyramid`) to strides such as 4, 8, 16, 32

b batch, y x rows and columns of a map, d_i its channels, s_i its stride in pixels.
Source: the published segmenters and detectors of VMamba, Spatial-Mamba, MambaVision (norms per map) and Vim (pyramid).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.backbone import ImageBackbone
from ssmzoo.layers.image.patch_embed import map_norm


class StageMaps(nn.Module):
    """A norm of its own on every map: list of (b d_i y_i x_i) -> the same shapes. stages: their numbers, for names."""

    def __init__(self, dims: Sequence[int], stages: Sequence[int]):
        super().__init__()
        self.names = [f"outnorm{i}" for i in stages]
        for name, dim in zip(self.names, dims):
            self.add_module(name, map_norm("ln", dim))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        normed = (self.get_submodule(name)(x.permute(0, 2, 3, 1)) for name, x in zip(self.names, maps))
        return [x.permute(0, 3, 1, 2).contiguous() for x in normed]


def rescale(dim: int, factor: float) -> nn.Module:
    """(b dim y x) -> (b dim factor*y factor*x) for factors 4, 2 (transposed convolutions), 1 and less (pooling)."""
    if factor == 4:
        first, second = (nn.ConvTranspose2d(dim, dim, 2, 2) for _ in range(2))
        return nn.Sequential(first, nn.BatchNorm2d(dim), nn.GELU(), second)
    if factor == 2:
        return nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))
    return nn.Identity() if factor == 1 else nn.MaxPool2d(round(1 / factor), ceil_mode=True)


class SimplePyramid(nn.Module):
    """Four maps (b dim y x) of one stride -> maps of `strides`, each twice the one before.

    They begin at 4 pixels, or at the stride of the maps where that is finer, or at a quarter of it where it is above
    16. Names (fpn1, ..., fpn4) and layers are those of the published segmenters of Vim.
    """

    def __init__(self, dim: int, stride: int, min_stride: int = 0):
        super().__init__()
        if stride & (stride - 1):
            raise ValueError(
                f"a plain backbone with patches every {stride} pixels gives no pyramid: take a patch_size that is a "
                f"power of two, such as 8 or 16"
            )
        first = max(min(4, stride), stride // 4)
        strides = {i: first * 2**i for i in range(4)}
        self.kept = [i for i, s in strides.items() if s >= min_stride] or [3]
        self.strides = [strides[i] for i in self.kept]
        for i in self.kept:
            self.add_module(f"fpn{i + 1}", rescale(dim, stride / strides[i]))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.get_submodule(f"fpn{i + 1}")(maps[i]) for i in self.kept]


class DenseMaps(nn.Module):
    """A backbone and what makes its maps ready for dense heads. (b c y x) -> list of (b d_i y/s_i x/s_i)

    backbone     an `ImageBackbone`; its classifier and final norm are removed
    out_indices  stages (default: all) or, of plain backbones, four blocks (default: at each quarter of the depth)
    tap          of plain backbones: "stream", the residual stream behind a block, or "branch", what the block adds
    min_stride   finer maps are left out, as long as one remains

    dims, strides   d_i and s_i.  Images are padded below and right to a multiple of `multiple`; the maps are cut to
    ceil(y / s_i) rows. Raises ValueError for a model without maps.
    """

    def __init__(
        self,
        backbone: ImageBackbone,
        out_indices: Sequence[int] | None = None,
        tap: str = "stream",
        min_stride: int = 0,
    ):
        super().__init__()
        info = checked_info(backbone)
        self.plain = len(info) > 1 and len({i["reduction"] for i in info}) == 1
        if out_indices is None:
            n = len(info)
            out_indices = [max(0, (i + 1) * n // 4 - 1) for i in range(4)] if self.plain else range(n)
        if self.plain and len(out_indices) != 4:
            raise ValueError(f"out_indices = {list(out_indices)}; a plain backbone gives four maps: name four blocks")
        if not self.plain:
            out_indices = [i for i in out_indices if info[i]["reduction"] >= min_stride] or [len(info) - 1]
        info = [info[i] for i in out_indices]
        self.out_indices, self.options = list(out_indices), {"tap": tap} if self.plain else {}
        self.dims, self.strides = [i["num_chs"] for i in info], [i["reduction"] for i in info]
        backbone.prune_intermediate_layers(sorted(set(self.out_indices)), prune_norm=True)
        self.backbone = backbone
        if self.plain:
            self.neck, patch = SimplePyramid(self.dims[0], self.strides[0], min_stride), self.strides[0]
            self.strides, self.dims = self.neck.strides, [self.dims[i] for i in self.neck.kept]
        else:
            self.neck, patch = StageMaps(self.dims, self.out_indices), 1
        self.multiple = max(*self.strides, patch)

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        taken = sorted(set(self.out_indices))  # timm's methods give every map once
        maps = self.backbone.forward_intermediates(x, taken, intermediates_only=True, **self.options)
        maps = self.neck([maps[taken.index(i)] for i in self.out_indices])
        return [m[:, :, : -(-height // s), : -(-width // s)] for m, s in zip(maps, self.strides)]


def checked_info(backbone: nn.Module) -> list[dict]:
    """timm's `feature_info` of a backbone. Raises ValueError for a model that has no maps."""
    info = getattr(backbone, "feature_info", None)
    if info is None or not isinstance(backbone, ImageBackbone):
        raise ValueError(
            f"{type(backbone).__name__} has no feature maps for dense prediction; take an image backbone: with a "
            f"pyramid (model=vmamba, spatial_mamba, mamba_vision, res_vmamba) or plain (vim, adventurer, "
            f"shuffle_mamba, mamba_reg_small)"
        )
    return info
