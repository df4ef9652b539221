"""causal_conv1d_fn and causal_conv1d_update on the kernels of causal-conv1d, mamba-ssm's companion."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, with_final_states
from ssmzoo.ops.eager import needs_grad
from ssmzoo.ops.mamba_ssm import install, load, refuses, same_dtype, segments

CONV = ("causal_conv1d", "causal_conv1d_fn")
UPDATE = ("causal_conv1d", "causal_conv1d_update")


def why_not_taps(a) -> str | None:
    if not 2 <= a.weight.shape[1] <= 4:
        return f"causal-conv1d takes 2 to 4 taps, got {a.weight.shape[1]}"
    return same_dtype(weight=a.weight, bias=a.bias)


def _eights(x: Tensor) -> bool:
    """Whether x (b c l) is channels-last with rows that causal-conv1d's vector loads can read."""
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.shape[1] % 8 == 0


def why_not(a) -> str | None:
    if a.seq_idx is not None and a.initial_states is not None:
        return "causal-conv1d does not combine seq_idx with initial_states"
    if (a.seq_idx is not None or a.initial_states is not None or a.x.stride(2) != 1) and not _eights(a.x):
        return (
            "causal-conv1d wants x channels-first, or channels-last in multiples of 8 (always so with seq_idx or "
            "initial_states)"
        )
    return why_not_taps(a) or refuses(*CONV, a.x, a.weight, a.bias, a.initial_states)


@causal_conv1d_fn.register("mamba_ssm", unsupported=why_not, **install(*CONV))
def causal_conv1d_mamba_ssm(a):
    first = a.initial_states
    if first is not None:
        first = first.to(a.x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    out = load(*CONV)[0](a.x, a.weight, a.bias, segments(a.seq_idx), first, activation=a.activation)
    if a.seq_idx is not None:  # padding; their backward would carry its gradients on
        out = out.masked_fill((a.seq_idx < 0)[:, None], 0)
    return with_final_states(out, a)


def why_not_update(a) -> str | None:
    if needs_grad(a.x, a.conv_state, a.weight, a.bias):
        return "causal-conv1d's step has no backward; the torch backend does"
    reason = why_not_taps(a) or same_dtype(x=a.x, conv_state=a.conv_state)
    return reason or refuses(*UPDATE, a.x, a.conv_state, a.weight, a.bias)


@causal_conv1d_update.register("mamba_ssm", unsupported=why_not_update, **install(*UPDATE))
def causal_conv1d_update_mamba_ssm(a):
    seen = None if a.cache_seqlens is None else a.cache_seqlens.int()
    # releases before 1.5 have no conv_state_indices
    rows = {} if a.conv_state_indices is None else {"conv_state_indices": a.conv_state_indices.int()}
    return load(*UPDATE)[0](a.x, a.conv_state, a.weight, a.bias, a.activation, seen, **rows)
