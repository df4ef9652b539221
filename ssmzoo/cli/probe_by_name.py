"""A probe's subject without a run: an image model by name, with initial or released weights, on real photographs."""

from __future__ import annotations

import argparse
from pathlib import Path

SIDE = 224  # pixels: pictures for classifiers are scaled to it
CROP = 64  # pixels: those for restoration are cut to it, since every pixel is a token there
SIZES = {"in_chans": 3, "num_classes": 1000, "img_size": SIDE, "upscale": 1}
RESTORATION = ("restoration", "denoise", "jpeg", "real_denoise")


def named_subject(name: str, args: argparse.Namespace):
    """The model `name` for colour images or their restoration, or `timm/NAME` of timm's, and the pictures it looks at:
    --input, or the embedded photographs. Weights: the initial ones of seed 0, with --pretrained the released ones.

    Raises ValueError for a name that is no image model, saying what else the argument may be, and DownloadError for
    weights that cannot be had.
    """
    import torch

    from ssmzoo.presets import build_model, list_models, read_model_config
    from ssmzoo.probes.subject import Subject
    from ssmzoo.suggest import nearest
    from ssmzoo.zoo import create_model

    torch.manual_seed(0)
    restores, side = False, SIDE
    if name.startswith("timm/"):
        model = of_timm(name[5:], args.pretrained)
    else:
        restoration = [n for task in RESTORATION for n in list_models(task=task)]
        names = list_models(task="classification") + restoration
        if name not in names:
            raise ValueError(
                f"no checkpoint or run folder at {name}, and no model for images of that name{nearest(name, names)} "
                f"(`ssmzoo list models --task classification` or --task restoration, or timm/NAME)"
            )
        node, restores = read_model_config(name)["model"], name in restoration
        for key, value in node.items():
            if isinstance(value, str) and value.startswith("${sizes:"):
                node[key] = SIZES[value[8:-1]]
        side = node.get("img_size", SIDE)
        side = side if isinstance(side, int) else SIDE
        model = create_model(name, pretrained=args.pretrained) if args.pretrained else build_model(node)
    return Subject(
        model.eval(),
        pictures(args, restores, side),
        layers=args.layers,
        channels=args.channels,
        target=args.target,
        max_bytes=int(args.max_bytes),
    )


def of_timm(name: str, pretrained: bool | str):
    if pretrained not in (True, False):
        raise ValueError(f"timm's files are chosen in the name: timm/{name}.{pretrained}, with --pretrained alone")
    from ssmzoo._torchvision import make_importable
    from ssmzoo.suggest import nearest

    make_importable()
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    try:
        return timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"timm cannot make {name!r}: {error}") from None


def pictures(args: argparse.Namespace, restores: bool = False, size: int = SIDE):
    """(b 3 size size), normalised: the largest centred square of every picture, scaled; for restoration (b 3 CROP CROP)
    in [0, 1], what stands in the middle."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from ssmzoo.data.images import IMAGENET
    from ssmzoo.data.photos import EMBEDDED_TRAIN, EMBEDDED_VAL, embedded_photo, read_levels

    if args.input is not None and not Path(args.input).exists():
        raise ValueError(f"--input {args.input}: no such picture")
    names = (EMBEDDED_VAL + EMBEDDED_TRAIN)[: args.batch]
    levels = [read_levels(Path(args.input))] if args.input else [embedded_photo(n) for n in names]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in IMAGENET)
    squares = []
    for picture in levels:
        y, x = picture.shape[:2]
        side = min(y, x, CROP) if restores else min(y, x)
        cut = picture[(y - side) // 2 :, (x - side) // 2 :][:side, :side]
        image = torch.from_numpy(np.ascontiguousarray(cut)).float().permute(2, 0, 1)[None] / 255
        if restores:
            squares.append(image.expand(-1, 3, -1, -1))
            continue
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        squares.append((image.expand(-1, 3, -1, -1) - mean) / std)
    return torch.cat(squares)
