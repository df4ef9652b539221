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
    return padded, [
        (max(0, i * size - overlap), min(padded, (i + 1) * size + overlap), i * size, (i + 1) * size)
        for i in range(count)
    ]


def published_tiles(height: int, width: int, side: int = PUBLISHED_TILE) -> tuple[tuple[int, int], list[Tile]]:
    """((padded height, padded width), tiles in row-major order) of the published protocol."""
    padded_height, rows = _axis(height, side)
    padded_width, columns = _axis(width, side)
    tiles = [Tile(r[0], r[1], c[0], c[1], r[2], r[3], c[2], c[3]) for r in rows for c in columns]
    return (padded_height, padded_width), tiles


def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Extend (... y x) at the bottom and right to height x width by reflection, the edge not repeated; any size."""
    for dim, wanted in ((-2, height), (-1, width)):
        n = x.shape[dim]
        if wanted > n:
            at = torch.arange(wanted, device=x.device) % max(1, 2 * n - 2)
            x = x.index_select(dim, torch.minimum(at, 2 * n - 2 - at))
    return x


def run_padded(model: Callable[[Tensor], Tensor], image: Tensor, scale: int, multiple: int) -> Tensor:
    """(b c y x) to (b c s*y s*x) by a model that needs sides that are multiples of `multiple`."""
    height, width = image.shape[-2:]
    y = model(reflect_pad(image, height + -height % multiple, width + -width % multiple))
    return y[..., : height * scale, : width * scale]


def run_published(model: Callable[[Tensor], Tensor], image: Tensor, scale: int, side: int = PUBLISHED_TILE) -> Tensor:
    """(b c y x) to (b c s*y s*x) by the published tiles."""
    height, width = image.shape[-2:]
    (padded_height, padded_width), tiles = published_tiles(height, width, side)
    image = reflect_pad(image, padded_height, padded_width)
    out = None
    for t in tiles:
        y = model(image[..., t.top : t.bottom, t.left : t.right])
        if out is None:
            out = y.new_zeros(*y.shape[:2], padded_height * scale, padded_width * scale)
        y = y[
            ...,
            (t.keep_top - t.top) * scale : (t.keep_bottom - t.top) * scale,
            (t.keep_left - t.left) * scale : (t.keep_right - t.left) * scale,
        ]
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


def axis_fades(starts: list[int], length: int, tile: int, overlap: int) -> list[Tensor]:
    """Weights (tile) of every tile along one axis; at every pixel they sum to 1.

    Of what two neighbours share, the middle `overlap / 2` pixels are cross-faded; before that the first tile counts
    alone and after it the second, so that the pixels next to a tile's edge, which saw its padding, are not used.
    """
    tile, ramp = min(tile, length), overlap // 2
    weights = [torch.ones(tile) for _ in starts]
    for i, (a, b) in enumerate(zip(starts, starts[1:])):
        shared = a + tile - b
        rising = ((torch.arange(shared) - (shared - ramp) // 2 + 0.5) / max(1, ramp)).clamp(0, 1)
        weights[i][tile - shared :] *= 1 - rising
        weights[i + 1][:shared] *= rising
    return weights


def run_blended(
    model: Callable[[Tensor], Tensor],
    image: Tensor,
    scale: int,
    tile: int = 192,
    overlap: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tensor]:
    """Strips of the restored image from top to bottom, each (c rows s*x); their rows add up to s*y.

    model    (1 c y x) -> (1 c s*y s*x)
    image    (c y x), any float; only a strip of the result is in memory at a time
    tile     side of a tile in degraded pixels; neighbours share `overlap` or more (at most a third of it)
    progress called with (tiles done, tiles in all)
    """
    if overlap > tile // 3:  # more would put three tiles over one pixel
        raise ValueError(f"overlap is {overlap}; with tiles of {tile} pixels it can be at most {tile // 3}")
    height, width = image.shape[-2:]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    row_fades = axis_fades(rows, height, tile, overlap)
    column_fades = axis_fades(columns, width, tile, overlap)
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
