"""Training crops and validation pictures for restoration; a crop is degraded as it would be in its whole picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssmzoo.data.degradation import benchmark_noise, gaussian_noise, grey, jpeg, to_uint8
from ssmzoo.data.loader import Draw
from ssmzoo.ops.imresize import imresize, mod_crop

JPEG_BLOCK = 16  # pixels of a chroma block at 4:2:0; a crop on this grid compresses as it does inside the whole picture
CACHE_BYTES = 1 << 30  # decoded pictures kept in memory per process


@dataclass(frozen=True)
class Photo:
    """A clean picture and, for paired data, its degraded partner; `read` functions return (y x 3) or (y x 1) uint8."""

    name: str
    read: Callable[[], np.ndarray]
    read_degraded: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True)
class Degradation:
    """How a clean picture becomes a degraded one; see PhotoData for the arguments."""

    kind: str
    scale: int
    sigma: tuple[float, float]
    quality: tuple[int, int]

    def training(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """A fresh degradation of (c y x), whose sides are multiples of the scale ."""
        if self.kind == "bicubic":
            return to_uint8(imresize(clean, 1 / self.scale)).float() / 255
        where = torch.rand((), generator=generator).item()
        if self.kind == "noise":
            return gaussian_noise(clean, self.sigma[0] + where * (self.sigma[1] - self.sigma[0]), generator)
        return jpeg(clean, round(self.quality[0] + where * (self.quality[1] - self.quality[0])))

    def benchmark(self, clean: Tensor) -> Tensor:
        """The published evaluation's degradation, the same every time; the lowest level of a range."""
        if self.kind == "bicubic":
            return to_uint8(imresize(clean, 1 / self.scale)).float() / 255
        return benchmark_noise(clean, self.sigma[0]) if self.kind == "noise" else jpeg(clean, self.quality[0])

    @property
    def margin(self) -> int:
        """Pixels around a crop that its degraded version depends on, as a multiple of `grid`."""
        return {"bicubic": 4 * self.scale, "jpeg": JPEG_BLOCK}.get(self.kind, 0)

    @property
    def grid(self) -> int:
        return JPEG_BLOCK if self.kind == "jpeg" else self.scale


class Pictures(Dataset):
    """Decoded photos as float tensors (c y x) in [0, 1], the most recent ones kept in memory as 8-bit levels."""

    def __init__(self, photos: list[Photo], degradation: Degradation, to_grey: bool):
        self.photos, self.degradation, self.to_grey = photos, degradation, to_grey
        self._kept: OrderedDict[tuple[int, bool], Tensor] = OrderedDict()

    def levels(self, index: int, degraded: bool) -> Tensor:
        """(c y x) uint8"""
        key = (index, degraded)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        photo = self.photos[index]
        found = torch.from_numpy(np.array((photo.read_degraded if degraded else photo.read)())).permute(2, 0, 1)
        if self.to_grey and found.shape[0] == 3:
            found = to_uint8(grey(found / 255))
        found = found.expand(3, -1, -1) if not self.to_grey and found.shape[0] == 1 else found
        self._kept[key] = found.contiguous()
        while len(self._kept) > 1 and sum(t.numel() for t in self._kept.values()) > CACHE_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key]

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """(clean levels cut to a multiple of the scale, degraded levels) of paired data."""
        clean, low = self.levels(index, False), self.levels(index, True)
        scale = self.degradation.scale
        height, width = low.shape[1] * scale, low.shape[2] * scale
        if not (0 <= clean.shape[1] - height < scale and 0 <= clean.shape[2] - width < scale):
            sizes = [f"{t.shape[1]} x {t.shape[2]}" for t in (clean, low)]
            raise ValueError(
                f"pair {self.photos[index].name}: the clean picture is {sizes[0]}, the other {sizes[1]}; "
                f"with data.scale = {scale} the clean one should be {height} x {width}"
            )
        return clean[:, :height, :width], low


class Patches(Pictures):
    """Random crops for training, {"lq" (c p/s p/s), "gt" (c p p)}; photo i mod n serves sample i."""

    def __init__(self, photos, degradation, to_grey, patch_size: int, repeats: int, augment: bool):
        super().__init__(photos, degradation, to_grey)
        self.patch, self.repeats, self.augment = patch_size, repeats, augment

    def __len__(self) -> int:
        return len(self.photos) * self.repeats

    def __getitem__(self, draw: Draw) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(draw.seed)
        index = draw.index % len(self.photos)
        make = self._paired if self.degradation.kind == "paired" else self._made
        return dict(zip(("lq", "gt"), self._flip(*make(index, generator), generator)))

    def _corner(self, shape, index: int, generator) -> tuple[int, int]:
        """Top and left of a crop, at multiples of the scale."""
        scale, ends = self.degradation.scale, []
        for side in shape[-2:]:
            if side < self.patch:
                raise ValueError(
                    f"{self.photos[index].name} is {shape[-2]} x {shape[-1]} pixels, smaller than "
                    f"data.patch_size = {self.patch}; lower patch_size or remove the picture"
                )
            ends.append(scale * torch.randint((side - self.patch) // scale + 1, (), generator=generator).item())
        return tuple(ends)

    def _made(self, index: int, generator) -> tuple[Tensor, Tensor]:
        """Degrade a crop with enough around it that the result equals a crop of the whole degraded picture."""
        d, p = self.degradation, self.patch
        whole = mod_crop(self.levels(index, False), d.scale)
        top, left = self._corner(whole.shape, index, generator)
        a, b = (max(0, v - d.margin) // d.grid * d.grid for v in (top, left))
        end_y, end_x = (-(-(v + p + d.margin) // d.grid) * d.grid for v in (top, left))
        low = d.training(whole[:, a:end_y, b:end_x] / 255, generator)
        y, x, q = (top - a) // d.scale, (left - b) // d.scale, p // d.scale
        return low[:, y : y + q, x : x + q], whole[:, top : top + p, left : left + p] / 255

    def _paired(self, index: int, generator) -> tuple[Tensor, Tensor]:
        clean, low = self.pair(index)
        top, left = self._corner(clean.shape, index, generator)
        s, p = self.degradation.scale, self.patch
        low = low[:, top // s : (top + p) // s, left // s : (left + p) // s]
        return low / 255, clean[:, top : top + p, left : left + p] / 255

    def _flip(self, low: Tensor, clean: Tensor, generator) -> tuple[Tensor, Tensor]:
        """Horizontal flip, vertical flip and transpose, each with probability 1/2, the same for both."""
        if not self.augment:
            return low, clean
        flips = torch.rand(3, generator=generator) < 0.5
        dims = [d for d, on in ((-1, flips[0]), (-2, flips[1])) if on]
        flipped = (t.flip(dims) if dims else t for t in (low, clean))
        return tuple((t.mT if flips[2] else t).contiguous() for t in flipped)


class WholePictures(Pictures):
    """Held-out photos, whole or their central `crop` pixels: {"lq", "gt", "name"}; degraded as in the benchmarks."""

    def __init__(self, photos, degradation, to_grey, crop: int | None):
        super().__init__(photos, degradation, to_grey)
        self.crop = crop

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, draw: Draw) -> dict[str, Tensor | str]:
        d = self.degradation
        if d.kind == "paired":
            clean, low = self.pair(draw.index)
            (clean, low), s = (clean / 255, low / 255), d.scale
            top, bottom, left, right = self._centre(clean.shape)
            low, clean = low[:, top // s : bottom // s, left // s : right // s], clean[:, top:bottom, left:right]
        else:
            clean = mod_crop(self.levels(draw.index, False) / 255, d.scale)
            top, bottom, left, right = self._centre(clean.shape)
            clean = clean[:, top:bottom, left:right]
            low = d.benchmark(clean)
        return {"lq": low, "gt": clean.contiguous(), "name": self.photos[draw.index].name}

    def _centre(self, shape) -> tuple[int, int, int, int]:
        s, ends = self.degradation.scale, []
        for side in shape[-2:]:
            length = side if self.crop is None else min(side, self.crop // s * s)
            start = (side - length) // 2 // s * s
            ends += [start, start + length]
        return tuple(ends)
