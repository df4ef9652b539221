"""Images of any size through a network in tiles: the published scheme, and a blended one with bounded memory.

`published_tiles` reproduces the tiles behind every published MambaIR number (about 200 pixels a side, overlap a tenth,
central parts pasted without blending). `run_blended` is for everything else: tiles of one fixed size whose overlaps are
cross-faded, so that no seam shows, and a strip of tiles is all that is ever held in memory.
Source of the first: MambaIR@33d7b34, `basicsr/models/mambair_model.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PUBLISHED_TILE = 200  # pixels of the degraded image


class Tile(NamedTuple):
    """A tile of the degraded image: its rows and columns, and the part of them whose result is kept."""

    top: int
    bottom: int
    left: int
    right: int
    keep_top: int
    keep_bottom: int
    keep_left: int
    keep_right: int


def _axis(length: int, side: int) -> tuple[int, list[tuple[int, int, int, int]]]:
    """(padded length, [(start, end, keep_start, keep_end)]) of one axis."""
    count = length // side + 1
    padded = -(-length // count) * count
    size = padded // count
    overlap = size // 10
    return padded, [(max(0, i * size - overlap), min(padded, (i + 1) * size + overlap), i * size, (i + 1) * size)
                    for i in range(count)]


def published_tiles(height: int, width: int, side: int = PUBLISHED_TILE) -> tuple[tuple[int, int], list[Tile]]:
    """((padded height, padded width), tiles in row-major order) of the published protocol."""
    padded_height, rows = _axis(height, side)
    padded_width, columns = _axis(width, side)
    tiles = [Tile(r[0], r[1], c[0], c[1], r[2], r[3], c[2], c[3]) for r in rows for c in columns]
    return (padded_height, padded_width), tiles


def run_published(model: Callable[[Tensor], Tensor], image: Tensor, scale: int, side: int = PUBLISHED_TILE) -> Tensor:
    """(b c y x) to (b c s*y s*x) by the published tiles."""
    height, width = image.shape[-2:]
    (padded_height, padded_width), tiles = published_tiles(height, width, side)
    image = F.pad(image, (0, padded_width - width, 0, padded_height - height), mode="reflect")
    out = None
    for t in tiles:
        y = model(image[..., t.top : t.bottom, t.left : t.right])
        if out is None:
            out = y.new_zeros(*y.shape[:2], padded_height * scale, padded_width * scale)
        y = y[..., (t.keep_top - t.top) * scale : (t.keep_bottom - t.top) * scale,
              (t.keep_left - t.left) * scale : (t.keep_right - t.left) * scale]
        out[..., t.keep_top * scale : t.keep_bottom * scale, t.keep_left * scale : t.keep_right * scale] = y
    return out[..., : height * scale, : width * scale]


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Starts of equal tiles that cover `length` with at least `overlap` shared pixels; one start when all fits."""
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap is {overlap}; it must be at least 0 and smaller than the tile of {tile} pixels")
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def fade(length: int, before: int, after: int) -> Tensor:
    """(length) weights of one tile along one axis: a rising ramp over `before` pixels, a falling one over `after`."""
    weight = torch.ones(length)
    if before:
        weight[:before] = (torch.arange(before) + 0.5) / before
    if after:
        weight[length - after :] *= (torch.arange(after, 0, -1) - 0.5) / after
    return weight


def axis_fades(starts: list[int], length: int, tile: int) -> list[Tensor]:
    """Weights of every tile along one axis; neighbours sum to 1 in what they share."""
    tile = min(tile, length)
    shared = [a + tile - b for a, b in zip(starts, starts[1:])]
    return [fade(tile, shared[i - 1] if i else 0, shared[i] if i < len(shared) else 0) for i in range(len(starts))]


def run_blended(model: Callable[[Tensor], Tensor], image: Tensor, scale: int, tile: int = 192, overlap: int = 32,
                progress: Callable[[int, int], None] | None = None) -> Iterator[Tensor]:
    """Strips of the restored image from top to bottom, each (c rows s*x); their rows add up to s*y.

    model    (1 c y x) -> (1 c s*y s*x)
    image    (c y x), any float; only a strip of the result is in memory at a time
    tile     side of a tile in degraded pixels; overlap (at most half of it) is cross-faded
    progress called with (tiles done, tiles in all)
    """
    if overlap > tile // 2:
        raise ValueError(f"overlap is {overlap}; with tiles of {tile} pixels it can be at most {tile // 2}")
    height, width = image.shape[-2:]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    row_fades = axis_fades(rows, height, tile)
    column_fades = axis_fades(columns, width, tile)
    carried = None  # weighted sum of the rows that the next row of tiles shares
    for i, top in enumerate(rows):
        strip = None
        for j, left in enumerate(columns):
            y = model(image[None, :, top : top + tile, left : left + tile])[0]
            if strip is None:
                strip = y.new_zeros(y.shape[0], y.shape[1], width * scale)
            x_weight = column_fades[j].repeat_interleave(scale).to(y)
            strip[..., left * scale : left * scale + y.shape[2]] += y * x_weight
            if progress is not None:
                progress(i * len(columns) + j + 1, len(rows) * len(columns))
        strip *= row_fades[i].repeat_interleave(scale).to(strip)[:, None]
        if carried is not None:
            strip[:, : carried.shape[1]] += carried
        done = ((rows[i + 1] if i + 1 < len(rows) else height) - top) * scale
        carried = strip[:, done:].clone()
        yield strip[:, :done]


def self_ensemble(model: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Plain mean over the 8 flips and transposes of a (b c y x) image, each result mapped back."""
    total = 0
    for transpose in (False, True):
        for vertical in (False, True):
            for horizontal in (False, True):
                flips = [d for d, on in ((-1, horizontal), (-2, vertical)) if on]
                x = image.flip(flips) if flips else image
                y = model(x.mT.contiguous() if transpose else x)
                y = y.mT if transpose else y
                total = total + (y.flip(flips) if flips else y)
    return total / 8
