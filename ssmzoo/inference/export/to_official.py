"""The names and the file that the system's own released code reads."""

from __future__ import annotations

from pathlib import Path

import torch

from ssmzoo.inference.export.source import Source, contiguous, family_of_class, save_tensors
from ssmzoo.released.family import find, to_official

RUNNER = ("model", "params")  # the wrappers of image training scripts: DeiT's and VMamba's, and BasicSR's


def refuse(source: Source) -> str | None:
    if family_of_class(source.cls) is None:
        return "no released code has this model"
    return None


def write(source: Source, folder: Path) -> None:
    family = family_of_class(source.cls)
    state = contiguous(to_official(family, source.model))
    wrapper = wrapper_of(source)
    if wrapper is None:
        save_tensors(state, folder / f"{family}.safetensors")
    else:
        torch.save({wrapper: state}, folder / f"{family}.pth")


def wrapper_of(source: Source) -> str | None:
    """The key that the official evaluation reads from its file; None: a plain state dict."""
    if source.kind not in ("image", "restoration"):
        return None
    wanted = find(family_of_class(source.cls), "WRAPPERS") or RUNNER
    return next(key for key in wanted if key in RUNNER)


def usage(source: Source) -> str:
    family = family_of_class(source.cls)
    wrapper = wrapper_of(source)
    where = "plain state dict" if wrapper is None else f"state dict under the key `{wrapper}`"
    return f"A {where} in the names of the released code of family `{family}`; here `ssmzoo.load_official` reads it."
