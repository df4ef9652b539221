"""Causal depthwise convolution along time, as in front of every Mamba scan, and its decoding step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable, Kernel, without
from ssmzoo.ops.rows import expect_indices, read_rows, without_padding, write_rows

ACTIVATIONS = (None, "silu", "swish")


def check_causal_conv1d(a) -> None:
    sizes = _check_weight(a, expect_floats(a, {}, x="bcl", weight="ck", bias="c"))
    expect_floats(a, sizes, initial_states=("b", "c", "k-1"), final_states_out=("b", "c", "k-1"))
    if a.final_states_out is not None and not a.return_final_states:
        raise ValueError("final_states_out was given but return_final_states is False; set it to True")
    expect_seq_idx(a.seq_idx, a.x.device, sizes)


def _check_weight(a, sizes: dict[str, int]) -> dict[str, int]:
    if sizes["k"] == 0:
        raise ValueError(f"weight has shape {tuple(a.weight.shape)}, expected at least one tap (c, k >= 1)")
    if a.activation not in ACTIVATIONS:
        raise ValueError(f"activation is {a.activation!r}, expected None, 'silu' or 'swish'")
    sizes["k-1"] = sizes["k"] - 1
    return sizes


@op(check=check_causal_conv1d)
def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve every channel with its own taps, looking back only.

        y_t = act(bias + sum_j weight_j x_{t-(k-1)+j})        j = 0 .. k-1: the last tap meets the current token

    x               (b c l)    any strides
    weight, bias    (c k), (c) any k >= 1
    seq_idx         (b l)      integers; no tap reaches back across a change of the value; a negative one marks padding,
                               where y is 0 whatever x holds
    initial_states  (b c k-1)  the inputs before x, oldest first; zeros by default
    activation      None, "silu" or "swish" (the same)
    returns         (b c l) in x's dtype; with return_final_states also the last k-1 inputs (b c k-1), those before the
                    last change of seq_idx and padding as zeros, written into final_states_out when that is given

    Raises ValueError when shapes, dtypes or devices disagree, naming the argument. The signature is causal-conv1d's;
    sequence index and initial states may be combined. Source: Dao-AILab/causal-conv1d.
    """
    dtype, length, taps = compute_dtype(x, weight), x.shape[2], weight.shape[1]
    padding = None if seq_idx is None else (seq_idx < 0)[:, None]
    x = x if padding is None else x.masked_fill(padding, 0)
    padded = with_past(x, initial_states, taps)
    segment = None if seq_idx is None else F.pad(resets(seq_idx).cumsum(1), (taps - 1, 0))[:, None]  # b 1 k-1+l
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for j in range(taps):
        term = padded[..., j : j + length].to(dtype) * weight[:, j, None].to(dtype)
        if segment is not None:
            term = torch.where(segment[..., j : j + length] == segment[..., taps - 1 :], term, torch.zeros_like(term))
        y = y + term
    y = y if bias is None else y + bias.to(dtype)[:, None]
    if seq_idx is not None:
        y = y.masked_fill(padding, 0)
    out = (y if activation is None else F.silu(y)).to(x.dtype)
    if not return_final_states:
        return out
    return out, _final_states(x, seq_idx, initial_states, taps - 1, final_states_out)


def with_past(x: Tensor, initial_states: Tensor | None, taps: int) -> Tensor:
    """(b c k-1+l): the inputs with what came before them."""
    past = x.new_zeros(*x.shape[:2], taps - 1) if initial_states is None else initial_states.to(x.dtype)
    return torch.cat([past, x], dim=2)


def last_inputs(x: Tensor, seq_idx: Tensor | None, initial_states: Tensor | None, count: int) -> Tensor:
    """The final states (b c count): the last inputs, those before the last change of seq_idx and padding as zeros."""
    states = x[..., max(0, x.shape[2] - count) :]
    if states.shape[2] < count:
        states = with_past(states, initial_states, count + 1)[..., states.shape[2] :]
    if seq_idx is not None and x.shape[2] > 0:
        segment = F.pad(resets(seq_idx).cumsum(1), (count, 0))[:, None]  # b 1 count+l
        same = (segment[..., segment.shape[2] - count :] == segment[..., -1:]) & (seq_idx[:, None, -1:] >= 0)
        states = torch.where(same, states, torch.zeros_like(states))
    return states.clone()  # never a view of x


def _final_states(x, seq_idx, initial_states, count, out: Tensor | None) -> Tensor:
    states = last_inputs(x, seq_idx, initial_states, count)
    return states if out is None else out.copy_(states)


def with_final_states(out: Tensor, a) -> Tensor | tuple[Tensor, Tensor]:
    """What the operator returns when its kernel has computed `out`."""
    if not a.return_final_states:
        return out
    count = a.weight.shape[1] - 1
    return out, _final_states(a.x, a.seq_idx, a.initial_states, count, a.final_states_out)


def empty_gradients(a) -> dict[str, Tensor]:
    """Uninitialised gradients: x in its own layout, the others contiguous."""
    rest = {name: getattr(a, name) for name in ("weight", "bias", "initial_states")}
    grads = {"x": torch.empty_like(a.x)}
    return grads | {name: t.new_empty(t.shape) for name, t in rest.items() if t is not None}


CONVOLUTION = Differentiable(
    "causal_conv1d",
    without(causal_conv1d_fn.Arguments, "return_final_states", "final_states_out"),
    ("out",),
    like=lambda a: (torch.empty_like(a.x),),
    gradients=empty_gradients,
)


def register(backend: str, kernel: Kernel, **why_not) -> None:
    """Serve causal_conv1d_fn by a kernel; the keywords are those of Backend."""
    CONVOLUTION.kernels[backend] = kernel
    eager = functools.partial(_convolve, functools.partial(CONVOLUTION.eager, backend))
    traced = functools.partial(_convolve, lambda inputs: CONVOLUTION(inputs, backend))
    causal_conv1d_fn.register(backend, eager=eager, **why_not)(traced)


def _convolve(convolution: Callable, a: tuple) -> Tensor | tuple[Tensor, Tensor]:
    out = convolution(CONVOLUTION.Inputs(a.x, a.weight, a.bias, a.seq_idx, a.initial_states, a.activation))
    return with_final_states(out, a) if a.return_final_states else out


def check_causal_conv1d_update(a) -> None:
    tokens, row = "bc" if a.x.ndim == 2 else "bcl", "b" if a.conv_state_indices is None else "rows"
    sizes = _check_weight(a, expect_floats(a, {}, x=tokens, conv_state=(row, "c", "s"), weight="ck", bias="c"))
    if sizes["s"] < sizes["k-1"]:
        raise ValueError(f"conv_state holds {sizes['s']} inputs, expected at least k-1 = {sizes['k-1']}")
    if a.cache_seqlens is not None:
        expect("cache_seqlens", a.cache_seqlens, ("b",), sizes)
        if a.cache_seqlens.is_floating_point():
            raise ValueError(f"cache_seqlens has dtype {a.cache_seqlens.dtype}, expected an integer dtype, e.g. int32")
    expect_indices("conv_state_indices", a.conv_state_indices, a.x.device, sizes)


@op(check=check_causal_conv1d_update)
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next token or tokens, in place on the buffer of past inputs.

    x             (b c) or (b c l)  new inputs
    conv_state    (b c s), s >= k-1 past inputs, oldest first; shifted left by l and filled with x, in place
    cache_seqlens (b) integers      conv_state is circular instead: so many tokens came before, and the input of step t
                                    stands at t modulo s; x may be longer than s
    conv_state_indices (b) integers the row of conv_state, which may have more, that each sequence has; negative for
                                    padding, where y is 0 and no state changes
    returns       as x

    Taps, activation and errors are those of causal_conv1d_fn, IndexError for a row that does not exist. The signature
    is causal-conv1d's.
    """
    tokens = x if x.ndim == 3 else x[..., None]
    length, size, taps = tokens.shape[2], conv_state.shape[2], weight.shape[1]
    rows = read_rows(conv_state, conv_state_indices)
    if cache_seqlens is None:
        seen = torch.cat([rows.to(x.dtype), tokens], dim=2)
        past, new = seen[..., size - taps + 1 : size], seen[..., length:]
    else:

        def slots(first, count):  # (b c count)
            steps = torch.arange(first, first + count, device=x.device) + cache_seqlens[:, None]
            return (steps % max(size, 1))[:, None].expand(-1, x.shape[1], -1)

        rows = rows.clone()  # gather's backward keeps its argument, and conv_state is overwritten below
        past = rows.gather(2, slots(1 - taps, taps - 1)).to(x.dtype)
        kept = min(length, size)
        new = rows.scatter(2, slots(length - kept, kept), tokens[..., length - kept :].to(rows.dtype))
    write_rows(conv_state, conv_state_indices, new)
    out = causal_conv1d_fn.reference(tokens, weight, bias, initial_states=past, activation=activation)
    return without_padding(out if x.ndim == 3 else out[..., 0], conv_state_indices)
