"""mamba-ssm and causal-conv1d: their kernels serve on GPUs wherever they are installed and able.

What the adapters `<operator>/mamba_ssm.py` share.
They are imported with the first call that they could serve, not with this package: mamba-ssm brings transformers along.
An install that does not import, e.g. one compiled for another PyTorch, is reported once with its reason; from then on
the next backend serves. What their kernels lack is refused in words, and the next backend serves these calls as well.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import warnings

import torch
from torch import Tensor

from ssmzoo.ops.checks import resets, why_not_float
from ssmzoo.ops.eager import eager

PARAMETERS = {  # what the adapters rely on, in order; docs/gpu.md says in which releases
    "selective_scan_fn": "u delta A B C D z delta_bias delta_softplus return_last_state",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus",
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus "
    "dt_limit return_final_states",
    "causal_conv1d_fn": "x weight bias seq_idx initial_states return_final_states final_states_out activation",
    "causal_conv1d_update": "x conv_state weight bias activation cache_seqlens",
}
INSTALL = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
DEVICE = "cuda"


@functools.cache
def load(module: str, name: str):
    """(function `name` of `module` or None, why there is none); a broken install is reported once, as a warning."""
    package = INSTALL[module.partition(".")[0]]
    try:
        function = getattr(importlib.import_module(module), name)
        reason = _misfit(function, name, package)
    except Exception as error:  # ImportError or OSError for an undefined symbol, or anything else
        first_line = str(error).strip().partition("\n")[0]
        reason = f"{package} is installed but broken ({type(error).__name__}: {first_line}); reinstall it"
        if "selective_scan_cuda" in first_line:
            reason = f"{package} was built without the kernel of its Mamba-1 scan (no selective_scan_cuda)"
    if reason is None:
        return function, None
    _tell(f"{reason}. The next backend serves.")
    return None, reason


def _misfit(function, name: str, package: str) -> str | None:
    """Why a function is not the one that the adapters were written for, None when it is."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin: nothing is known
        return None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    wanted, found = PARAMETERS[name].split(), [p.name for p in parameters]
    required = [p.name for p in parameters if p.default is p.empty and p.name not in wanted]
    if found[: len(wanted)] == wanted and not required:
        return None
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    what = f"takes ({', '.join(found)}), expected ({', '.join(wanted)})"
    return f"{package} {version} has another {name} than ssmzoo knows: it {what}"


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
