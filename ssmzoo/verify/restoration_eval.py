"""The published evaluation protocol of image restoration as golden cases: degradations, metrics, rounding, tiles."""

from __future__ import annotations

import torch
from torch import Tensor


def golden(case) -> dict[str, Tensor]:
    """One case of family restoration_eval; its inputs say which one. Tensors there are (y x c) RGB or (y x)."""
    names = set(case.inputs)
    if "gray" in names:
        return _jpeg(case)
    if "img2" in names:
        return _metrics(case)
    if "x" in names:
        return _noise(case)
    return _resize(case) if names else _tiles(case)


def _resize(case):
    from ssmzoo.ops.imresize import imresize

    image = case.inputs["img"].permute(2, 0, 1)
    antialias = case.official_kwargs.get("antialiasing", True)
    out = {}
    for name, scale in case.official_kwargs["scales"].items():
        small = imresize(image, scale, antialias)
        out[name] = small.permute(1, 2, 0)
        out[f"{name}_uint8"] = (255 * out[name]).round().clamp(0, 255)
        out[f"gray_{name}"] = small[0]
    return out


def _jpeg(case):
    from ssmzoo.data.degradation import jpeg

    image = case.inputs["gray"][None] / 255
    return {f"q{q}": jpeg(image, q)[0] * 255 for q in case.official_kwargs["quality"]}


def _noise(case):
    from ssmzoo.data.degradation import benchmark_noise, grey, to_uint8

    image = case.inputs["img"].permute(2, 0, 1) / 255
    out = {"gray": grey(image), "x_uint8_rgb": to_uint8(case.inputs["x"][0]).permute(1, 2, 0).float()}
    for sigma in case.official_kwargs["noise"]:
        out[f"noisy{sigma}"] = benchmark_noise(image, sigma)
        out[f"gray_noisy{sigma}"] = benchmark_noise(out["gray"], sigma)
    return out


def _metrics(case):
    from ssmzoo.tasks.metrics.image import luma, psnr, rgb_to_ycbcr, ssim, ycbcr_to_rgb

    a, b = (case.inputs[n].permute(2, 0, 1) for n in ("img", "img2"))
    out = {}
    for crop in case.official_kwargs["crop_border"]:
        for kind, x, y, y_channel in (("rgb", a, b, False), ("y", a, b, True), ("gray", a[1:2], b[1:2], False)):
            for name, metric in (("psnr", psnr), ("ssim", ssim)):
                value = metric(x, y, crop, y_channel)
                out[f"{name}_crop{crop}_{kind}"] = torch.tensor([value], dtype=torch.float64)
    ycbcr = rgb_to_ycbcr(a)
    levels = ycbcr.round()
    back = ycbcr_to_rgb(levels, wrap=True)
    return out | {
        "y_of_img": luma(a)[0],
        "ycbcr_of_img": ycbcr.permute(1, 2, 0),
        "ycbcr_uint8_of_img": levels.permute(1, 2, 0),
        "rgb_back_uint8": back.permute(1, 2, 0),
    }


def _tiles(case):
    from ssmzoo.inference.tiling import published_tiles

    out = {}
    for name, expected in case.outputs.items():
        if not name.endswith("_size_scale"):
            continue
        prefix = name.removesuffix("_size_scale")
        height, width, _ = (int(v) for v in expected)  # the case has no inputs: its sizes are listed as an output
        _, tiles = published_tiles(height, width)
        edges = (sorted({t.keep_top for t in tiles} - {0}), sorted({t.keep_left for t in tiles} - {0}))
        out[name] = expected.clone()
        corners = [(t.top, t.left, t.bottom - t.top, t.right - t.left) for t in tiles]
        out[f"{prefix}_tiles"] = torch.tensor(corners).float()
        for kind, values in zip(("row", "col"), edges):
            out[f"{prefix}_owner_{kind}_edges"] = torch.tensor(values or [-1]).float()
    return out
