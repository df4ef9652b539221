"""mamba-ssm and causal-conv1d: their kernels serve on GPUs wherever they are installed and able.

What the adapters `<operator>/mamba_ssm.py` share.
They are imported with the first call that they could serve, not with this package: mamba-ssm brings transformers along.
An install that does not import, e.g. one compiled for another PyTorch, is reported once with its reason; from then on
the next backend serves. What their kernels lack is refused in words, and the next backend serves these calls as well.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.eager import eager

INSTALL = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
DEVICE = "cuda"


@functools.cache
def load(module: str, name: str):
    """(function `name` of `module` or None, why there is none); a broken install is reported once, as a warning."""
    package = INSTALL[module.partition(".")[0]]
    try:
        return getattr(importlib.import_module(module), name), None
    except Exception as error:  # ImportError or OSError for an undefined symbol, or anything else
        first_line = str(error).strip().partition("\n")[0]
        reason = f"{package} is installed but broken ({type(error).__name__}: {first_line}); reinstall it"
    _tell(f"{reason}. The next backend serves.")
    return None, reason


@functools.cache
def _tell(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def missing(package: str) -> str | None:
    """Why a package is not there at all, found without importing it."""
    try:
        found = importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module without a spec
        found = False
    return None if found else f"{INSTALL[package]} is not installed"


def install(module: str, name: str) -> dict:
    """The keywords of `register` for an adapter to function `name` of `module`: device, missing and broken."""
    package = module.partition(".")[0]
    return {"device": DEVICE, "missing": missing(package), "broken": lambda: load(module, name)[1]}


def refuses(module: str, name: str, *tensors: Tensor | None) -> str | None:
    """The objections that all adapters share."""
    if not eager(*tensors):
        return f"{INSTALL[module.partition('.')[0]]} cannot be traced by torch.compile or torch.func"
    if tensors[0].numel() == 0:
        return "is given nothing to do"
    return why_not_float(*tensors) or load(module, name)[1]


def same_dtype(**tensors: Tensor | None) -> str | None:
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) < 2:
        return None
    given = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
    return f"wants one dtype, got {given}"


def segments(seq_idx: Tensor | None) -> Tensor | None:
    """Their kernels compare values, not neighbours: number the sequences, so that none comes twice. The first is 0."""
    return None if seq_idx is None else resets(seq_idx).cumsum(1, dtype=torch.int32)
