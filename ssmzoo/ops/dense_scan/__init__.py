"""Dense selective scan (SD-SSM): the transition matrix of every step is a mixture of K dense matrices.

    M_t = sum_k w_t[k] A_k        T_t[:, j] = M_t[:, j] / |M_t[:, j]|_p        h_t = T_t h_{t-1} + x_t

The columns are normalised after mixing. When the inputs are discrete, T_t depends on the symbol alone and each distinct
transition is computed once. Backends: a sequential loop whose transitions are formed in slices of time and formed again
by the backward pass, a parallel form that multiplies transitions (n^3 work per step instead of n^2, but no long chain),
and a compiled loop for symbols on CPUs.

Letters: b batch, l length, n state size, k matrices in the dictionary, s distinct symbols.
Source: Terzic et al. 2025 (arXiv 2412.19350), section 4; IBM/selective-dense-state-space-model models/SDSSM.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.transforms import transformed

RESET, SKIP = 1 << 30, 1 << 28  # flags in the step codes, above any symbol


def mix_transitions(A_dict: Tensor, weights: Tensor, p_norm: float = 1.0) -> Tensor:
    """T = M / |columns of M|_p with M = sum_k weights[..., k] A_dict[:, :, k].

    A_dict   (n n k)  row, column, matrix (the official layout, k last)
    weights  (... k)  usually a softmax over k
    returns  (... n n)

    A column of zeros gives NaN, as in the official code.
    """
    M = torch.einsum("ijk,...k->...ij", A_dict, weights)
    return M / torch.linalg.vector_norm(M, p_norm, dim=-2, keepdim=True)


class Mixing(NamedTuple):
    """The arguments of `mix_transitions`; weights (s k)."""

    A_dict: Tensor
    weights: Tensor
    p_norm: float


def mix_forward(a: Mixing, save: bool) -> tuple[tuple[Tensor], Tensor]:
    """Kept are M and sign(M) |M|^(p-1)."""
    p, kept = a.p_norm, mixed(a)
    M, slope = kept
    torch.pow(M.abs(), p - 1, out=slope).mul_(M.sign())
    return (M / (M * slope).sum(-2, keepdim=True).pow_(1 / p),), kept


def mix_backward(a: Mixing, kept: Tensor, dT: Tensor) -> dict[str, Tensor]:
    """dM = (dT - sign(M) |M|^(p-1) sum_i(dT M) / v^p) / v, with v^p = sum_i |M|^p and i the row."""
    M, slope = kept
    power = (M * slope).sum(-2, keepdim=True)
    pull = (dT * M).sum(-2, keepdim=True).div_(power)
    return unmixed(a, torch.addcmul(dT, slope, pull, value=-1).div_(power.pow_(1 / a.p_norm)))


def mixed(a: Mixing) -> Tensor:
    """Two tensors (s n n) in one: M, and room for what else is kept."""
    n, (s, k) = len(a.A_dict), a.weights.shape
    kept = a.weights.new_empty(2, s, n, n)
    torch.mm(a.weights, a.A_dict.view(-1, k).T, out=kept[0].view(s, -1))
    return kept


def unmixed(a: Mixing, dM: Tensor) -> dict[str, Tensor]:
    """Gradients from that of M (s n n)."""
    dM = dM.flatten(1)
    return {"A_dict": (dM.T @ a.weights).view(a.A_dict.shape), "weights": dM @ a.A_dict.flatten(0, 1)}


MIX = Differentiable(
    "mix_transitions", Mixing, saved="kept", twice=lambda a: mix_transitions(a.A_dict, a.weights, a.p_norm)
)
MIX.kernels["torch"] = Kernel(mix_forward, mix_backward)


def check(a) -> None:
    sizes: dict[str, int] = {}
    device = a.A_dict.device
    expect("A_dict", a.A_dict, ("n", "n", "k"), sizes)
    if a.p_norm <= 0:
        raise ValueError(f"p_norm = {a.p_norm}, expected a positive number, usually between 1 and 2")
    if a.symbols is None:
        if a.weights.ndim == 2:
            shape = tuple(a.weights.shape)
            raise ValueError(f"weights has shape {shape}, expected (b, l, k): give symbols with (s, k)")
        expect("weights", a.weights, ("b", "l", "k"), sizes)
        expect("inputs", a.inputs, ("b", "l", "n"), sizes)
    else:
        if a.symbols.is_floating_point() or a.symbols.is_complex() or a.symbols.dtype == torch.bool:
            raise ValueError(f"symbols has dtype {a.symbols.dtype}, expected an integer dtype such as int64")
        if a.symbols.device != device:
            raise ValueError(f"symbols is on {a.symbols.device}, A_dict on {device}; move them to one device")
        expect("symbols", a.symbols, ("b", "l"), sizes)
        expect("weights", a.weights, ("s", "k"), sizes)
        expect("inputs", a.inputs, ("s", "n") if a.inputs.ndim == 2 else ("b", "l", "n"), sizes)
    if a.mask is not None:
        expect("mask", a.mask, ("b", "l"), sizes)
        if a.mask.dtype != torch.bool or a.mask.device != device:
            raise ValueError(
                f"mask is {a.mask.dtype} on {a.mask.device}, expected torch.bool on {device}: True for real positions"
            )
    expect_floats(a, sizes, A_dict="nnk", weights="...", inputs="...", initial_state="bn")
    expect_seq_idx(a.seq_idx, device, sizes)


@op(check=check)
def dense_scan(
    A_dict: Tensor,
    weights: Tensor,
    inputs: Tensor,
    p_norm: float = 1.0,
    symbols: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    all_steps: bool = True,
    parallel: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Run h_t = T_t h_{t-1} + x_t with column-normalised mixtures T_t of the matrices in A_dict.

    A_dict    (n n k)    row, column, matrix
    weights   (b l k)    mixture of every step; with symbols: (s k), the mixture of every distinct symbol
    inputs    (b l n)    x_t, i.e. W_b times the model's input; with symbols also (s n), one per distinct symbol
    p_norm               p of the column norm
    symbols   (b l) int  symbol of every step, 0 <= symbol < s
    initial_state (b n)  state before the first step, zero when missing
    mask      (b l) bool False leaves the state as it is (padding)
    seq_idx   (b l) int  where it changes from t-1 to t, the state is set to 0 before t
    all_steps            False returns the last step only, and without gradients keeps nothing else in memory
    parallel             multiply transitions over blocks of time: None lets the backend decide (never on a CPU with
                         the compiled loop), True and False insist
    returns   (b l n) or (b 1 n) states in inputs' dtype, and the last state (b n), fp32 (float64 for float64 input)

    Raises ValueError naming the argument, and IndexError for a symbol out of range.
    """
    dtype = compute_dtype(A_dict, weights, inputs)
    with torch.autocast(A_dict.device.type, enabled=False):
        T = mix_transitions(A_dict.to(dtype), weights.to(dtype), p_norm)
    x = inputs.to(dtype)
    b, l = weights.shape[:2] if symbols is None else symbols.shape
    codes = step_codes(b, l, A_dict.device, symbols, mask, seq_idx)
    if symbols is not None:
        if not transformed():  # whose tensors have no single value; there torch's indexing finds a bad symbol
            check_codes(codes, T.shape[0])
        at = (codes & (SKIP - 1)).long()
        T, x = T[at], (x[at] if x.ndim == 2 else x)
    h = x.new_zeros(b, T.shape[-1]) if initial_state is None else initial_state.to(dtype)
    skip, reset = ((codes & flag).bool().unsqueeze(-1) for flag in (SKIP, RESET))  # (b l 1)
    steps = []
    with torch.autocast(A_dict.device.type, enabled=False):
        for t in range(l):
            h = torch.where(reset[:, t], 0.0, h)
            h = torch.where(skip[:, t], h, (T[:, t] @ h.unsqueeze(-1)).squeeze(-1) + x[:, t])
            steps.append(h)
    states = torch.stack(steps, dim=1) if steps else x
    return (states if all_steps else h.unsqueeze(1)).to(inputs.dtype), h


def step_codes(
    b: int, l: int, device: torch.device, symbols: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None
) -> Tensor:
    """What happens at each step, (b l) int32: its symbol (0 without symbols) plus the flags SKIP and RESET."""
    if symbols is None:
        codes = torch.zeros(b, l, dtype=torch.int32, device=device)
    else:
        codes = symbols.clamp(-1, SKIP - 1).to(torch.int32)
    if mask is not None:
        codes = torch.where(mask, codes, SKIP)
    if seq_idx is not None:
        codes = torch.where(resets(seq_idx), codes | RESET, codes)
    return codes.contiguous()


def check_codes(codes: Tensor, s: int) -> None:
    """IndexError unless every symbol of the codes lies in [0, s)."""
    symbols = codes & (SKIP - 1)
    if codes.numel() and (int(codes.min()) < 0 or int(symbols.max()) >= s):
        low, high = min(int(codes.min()), int(symbols.min())), int(symbols.max())
        raise IndexError(f"symbols reach from {low} to {high}, but weights describes the symbols 0 to {s - 1}")


class Symbols(NamedTuple):
    """A scan whose transitions T (s n n) are given by symbols: x (b l n), codes (b l), h0 (b n), of one dtype.

    keep: return all states, or none of them ((b 0 n)); parallel: multiply transitions over blocks of time
    """

    T: Tensor
    x: Tensor
    codes: Tensor
    h0: Tensor
    keep: bool
    parallel: bool


class Mixtures(NamedTuple):
    """A scan whose transitions are mixed at every step: A_dict (n n k), weights (b l k), the rest as in Symbols."""

    A_dict: Tensor
    weights: Tensor
    x: Tensor
    codes: Tensor
    h0: Tensor
    p_norm: float
    keep: bool
    parallel: bool


def empty_results(a: Symbols | Mixtures) -> tuple[Tensor, Tensor]:
    """Uninitialised last state (b n) and states (b l n) or (b 0 n)."""
    b, l, n = a.x.shape
    return a.x.new_empty(b, n), a.x.new_empty(b, l if a.keep else 0, n)


SYMBOLS, MIXTURES = (
    Differentiable(name, inputs, ("last", "states"), saved="states", like=empty_results, refer="reference")
    for name, inputs in (("dense_scan_symbols", Symbols), ("dense_scan_mixture", Mixtures))
)


def scan(a, backend: str, parallel: bool) -> tuple[Tensor, Tensor]:
    """dense_scan on the kernels registered under `backend`."""
    dtype = compute_dtype(a.A_dict, a.weights, a.inputs)
    b, l = a.weights.shape[:2] if a.symbols is None else a.symbols.shape
    codes = step_codes(b, l, a.A_dict.device, a.symbols, a.mask, a.seq_idx)
    A_dict, weights, x = (v.to(dtype).contiguous() for v in (a.A_dict, a.weights, a.inputs))
    h0 = x.new_zeros(b, x.shape[-1]) if a.initial_state is None else a.initial_state.to(dtype).contiguous()
    keep = a.all_steps or needs_grad(A_dict, weights, x, h0)
    if a.symbols is None:
        last, states = MIXTURES(Mixtures(A_dict, weights, x, codes, h0, float(a.p_norm), keep, parallel), backend)
    else:
        with torch.autocast(A_dict.device.type, enabled=False):
            if eager(A_dict, weights) and 1 <= a.p_norm < math.inf:  # else one step of torch's after the other
                T = MIX(Mixing(A_dict, weights, float(a.p_norm)), backend if backend in MIX.kernels else "torch")
            else:
                T = mix_transitions(A_dict, weights, a.p_norm).contiguous()
        if x.ndim == 2:
            x = F.embedding((codes & (SKIP - 1)).clamp(max=len(x) - 1), x)  # the kernel reports bad symbols
        last, states = SYMBOLS(Symbols(T, x, codes, h0, keep, parallel), backend)
    return (states if a.all_steps else last.unsqueeze(1)).to(a.inputs.dtype), last
