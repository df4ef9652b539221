"""A picture of any size, depth and colour mode through a restoration model, in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmzoo.data.image_file import Picture, check_target, read_picture, write_picture
from ssmzoo.inference.tiling import run_blended, run_padded, self_ensemble
from ssmzoo.ops.imresize import imresize


def restore_file(model: nn.Module, source: str | Path, target: str | Path, **options) -> Picture:
    """Restore one picture file into another and return what was written; `options` as of `restore_levels`.

    Raises ImageError, before anything is computed, for a source that cannot be read and a target that cannot hold it.
    """
    picture = read_picture(source)
    check_target(target, picture)
    restored = restore_picture(model, picture, **options)
    write_picture(target, restored)
    return restored


def restore_picture(model: nn.Module, picture: Picture, **options) -> Picture:
    """The picture restored, its transparency enlarged, all that travels with it kept; options of `restore_levels`."""
    levels = restore_levels(model, torch.from_numpy(picture.levels).permute(2, 0, 1), picture.top, **options)
    alpha = picture.alpha
    if alpha is not None:
        alpha = enlarge_alpha(torch.from_numpy(alpha), picture.top, model.upscale).numpy()
    return dataclasses.replace(picture, levels=levels.permute(1, 2, 0).numpy(), alpha=alpha)


def restore_levels(
    model: nn.Module,
    levels: Tensor,
    top: int,
    *,
    tile: int = 192,
    overlap: int = 32,
    ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Restore integer levels 0..top (c y x) to levels (c s*y s*x) of the same type, on the model's device.

    tile, overlap  see `run_blended`; memory grows with the tile, not with the picture
    ensemble       average over 8 flips and transposes, 8 times slower
    A grey picture goes through a colour model as three equal channels, of which the mean is returned.
    Raises ValueError for a picture with more channels than the model takes.
    """
    channels, height, width = levels.shape
    if channels > model.in_chans:
        raise ValueError(
            f"the picture has {channels} colour channels and the model takes {model.in_chans}: convert "
            f"the picture to grey first, or use a colour model"
        )
    device, scale = next(model.parameters()).device, model.upscale

    def run(x: Tensor) -> Tensor:
        x = (x.float().to(device) / top).expand(-1, model.in_chans, -1, -1)
        y = self_ensemble(whole, x) if ensemble else whole(x)
        return y.mean(dim=1, keepdim=True) if channels < model.in_chans else y

    def whole(x: Tensor) -> Tensor:
        return run_padded(model, x, scale, model.size_multiple)

    out = torch.empty(height * scale, width * scale, channels, dtype=levels.dtype).permute(2, 0, 1)  # as files have it
    row = 0
    with torch.inference_mode():
        for strip in run_blended(run, levels, scale, tile, overlap, progress):
            out[:, row : row + strip.shape[1]] = (strip.clamp(0, 1) * top).round().cpu().to(levels.dtype)
            row += strip.shape[1]
    return out


def enlarge_alpha(alpha: Tensor, top: int, scale: int) -> Tensor:
    """Transparency (y x) enlarged by MATLAB's bicubic, a few hundred rows at a time; unchanged for scale 1."""
    if scale == 1:
        return alpha
    margin, step, rows = 4, 512, []
    for start in range(0, alpha.shape[0], step):
        first, last = max(0, start - margin), min(alpha.shape[0], start + step + margin)
        part = imresize(alpha[first:last].float() / top, float(scale))
        end = (min(alpha.shape[0], start + step) - first) * scale
        rows.append((part[(start - first) * scale : end].clamp(0, 1) * top).round().to(alpha.dtype))
    return torch.cat(rows)
