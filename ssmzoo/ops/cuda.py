"""Adapters to mamba-ssm and causal-conv1d: their kernels serve on GPUs wherever they are installed and able.

They are imported with the first call that they could serve, not with this package: mamba-ssm brings transformers along.
An install that does not import, e.g. one compiled for another PyTorch, is reported once with its reason; from then on
the next backend serves. What their kernels lack is refused in words, and the next backend serves these calls as well.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import warnings

import torch
from torch import Tensor

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, last_inputs
from ssmzoo.ops.checks import resets
from ssmzoo.ops.dispatch import needs_grad
from ssmzoo.ops.native import why_not_float
from ssmzoo.ops.selective_scan import selective_scan_fn, selective_state_update
from ssmzoo.ops.ssd import mamba_chunk_scan_combined

INSTALL = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
DEVICE = "cuda"


@functools.cache
def load(module: str, name: str):
    """(function `name` of `module` or None, why there is none); a broken install is told once, as a warning."""
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


def why_broken(module: str, name: str):
    """For the table of backends: the reason without the function."""
    return lambda: load(module, name)[1]


def _refuses(module: str, name: str, *tensors: Tensor | None) -> str | None:
    """The objections that all adapters share."""
    if torch.compiler.is_compiling():
        return f"{INSTALL[module.partition('.')[0]]} cannot be traced by torch.compile"
    if tensors[0].numel() == 0:
        return "is given nothing to do"
    return why_not_float(*tensors) or load(module, name)[1]


def _same_dtype(**tensors: Tensor | None) -> str | None:
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    if len(set(dtypes.values())) < 2:
        return None
    given = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
    return f"wants one dtype, got {given}"


def _segments(seq_idx: Tensor | None) -> Tensor | None:
    """Their kernels compare values, not neighbours: number the sequences, so that none comes twice. The first is 0."""
    return None if seq_idx is None else resets(seq_idx).cumsum(1, dtype=torch.int32)


SCAN = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


def why_not_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
) -> str | None:
    if initial_state is not None:
        return "mamba-ssm's selective scan takes no initial_state"
    if seq_idx is not None:
        return "mamba-ssm's selective scan takes no seq_idx"
    if A.is_complex():
        return "complex A runs on the reference backend only"
    if A.shape[1] > 256:
        return f"mamba-ssm's selective scan holds up to 256 states per channel, got {A.shape[1]}"
    if return_last_state and needs_grad(u, delta, A, B, C, D, z, delta_bias):
        return "mamba-ssm's selective scan has no gradient for the last state"
    groups = {M.shape[1] if M.ndim == 4 else 1 for M in (B, C) if M.ndim > 2}
    if len(groups) > 1:
        return "mamba-ssm's selective scan wants as many groups in B as in C"
    varying = {name: M for name, M in (("B", B), ("C", C)) if M.ndim > 2}
    return _same_dtype(u=u, delta=delta, z=z, **varying) or _refuses(*SCAN, u, delta, A, B, C, D, z, delta_bias)


@selective_scan_fn.register(
    "cuda", device=DEVICE, missing=missing("mamba_ssm"), unsupported=why_not_scan, broken=why_broken(*SCAN)
)
def selective_scan_cuda(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    *,
    initial_state=None,
    seq_idx=None,
):
    B, C = (M.float() if M.ndim == 2 else M for M in (B, C))
    D, delta_bias = (None if t is None else t.float() for t in (D, delta_bias))
    return load(*SCAN)[0](u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus, return_last_state)


UPDATE = ("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")


def why_not_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False) -> str | None:
    given = (state, x, dt, A, B, C, D, z, dt_bias)
    if needs_grad(*given):
        return "mamba-ssm's step has no backward; the torch backend does"
    return _refuses(*UPDATE, *given)


@selective_state_update.register(
    "cuda", device=DEVICE, missing=missing("mamba_ssm"), unsupported=why_not_state_update, broken=why_broken(*UPDATE)
)
def selective_state_update_cuda(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    return load(*UPDATE)[0](state, x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)


SSD = ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")


def why_not_ssd(
    x,
    dt,
    A,
    B,
    C,
    chunk_size=256,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
) -> str | None:
    if seq_idx is not None and initial_states is not None:
        return "mamba-ssm's chunk scan does not combine seq_idx with initial_states"
    return _same_dtype(x=x, z=z, B=B, C=C) or _refuses(*SSD, x, dt, A, B, C, D, z, dt_bias, initial_states)


@mamba_chunk_scan_combined.register(
    "cuda", device=DEVICE, missing=missing("mamba_ssm"), unsupported=why_not_ssd, broken=why_broken(*SSD)
)
def mamba_chunk_scan_cuda(
    x,
    dt,
    A,
    B,
    C,
    chunk_size=256,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
):
    chunk_size = min(256, max(16, 1 << chunk_size.bit_length() - 1))  # theirs are powers of two
    out = load(*SSD)[0](
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=_segments(seq_idx),
        dt_softplus=dt_softplus,
        dt_limit=tuple(dt_limit),
        return_final_states=return_final_states,
    )
    return (out[0], out[1].float()) if return_final_states else out


CONV = ("causal_conv1d", "causal_conv1d_fn")
CONV_UPDATE = ("causal_conv1d", "causal_conv1d_update")


def _why_not_taps(weight: Tensor, bias: Tensor | None) -> str | None:
    if not 2 <= weight.shape[1] <= 4:
        return f"causal-conv1d takes 2 to 4 taps, got {weight.shape[1]}"
    return _same_dtype(weight=weight, bias=bias)


def _eights(x: Tensor) -> bool:
    """Whether x (b c l) is channels-last with rows that causal-conv1d's vector loads can read."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.shape[1] % 8 == 0


def why_not_conv(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
) -> str | None:
    if seq_idx is not None and initial_states is not None:
        return "causal-conv1d does not combine seq_idx with initial_states"
    if (seq_idx is not None or initial_states is not None or x.stride(2) != 1) and not _eights(x):
        return (
            "causal-conv1d wants x channels-first, or channels-last in multiples of 8 (always so with seq_idx or "
            "initial_states)"
        )
    return _why_not_taps(weight, bias) or _refuses(*CONV, x, weight, bias, initial_states)


@causal_conv1d_fn.register(
    "cuda", device=DEVICE, missing=missing("causal_conv1d"), unsupported=why_not_conv, broken=why_broken(*CONV)
)
def causal_conv1d_cuda(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    first = initial_states
    if first is not None:
        first = first.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    out = load(*CONV)[0](x, weight, bias, _segments(seq_idx), first, activation=activation)
    if seq_idx is not None:  # padding; their backward would carry its gradients on
        out = out.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return out
    states = last_inputs(x, seq_idx, initial_states, weight.shape[1] - 1)
    return out, states if final_states_out is None else final_states_out.copy_(states)


def why_not_conv_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None) -> str | None:
    if needs_grad(x, conv_state, weight, bias):
        return "causal-conv1d's step has no backward; the torch backend does"
    return (
        _why_not_taps(weight, bias)
        or _same_dtype(x=x, conv_state=conv_state)
        or _refuses(*CONV_UPDATE, x, conv_state, weight, bias)
    )


@causal_conv1d_update.register(
    "cuda",
    device=DEVICE,
    missing=missing("causal_conv1d"),
    unsupported=why_not_conv_update,
    broken=why_broken(*CONV_UPDATE),
)
def causal_conv1d_update_cuda(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None):
    places = None if cache_seqlens is None else cache_seqlens.int()
    return load(*CONV_UPDATE)[0](x, conv_state, weight, bias, activation, places)
