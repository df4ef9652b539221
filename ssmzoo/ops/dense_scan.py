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

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops import dense_scan_torch as on_torch
from ssmzoo.ops.checks import compute_dtype, expect, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dense_scan_op import KERNELS, DenseKernel
from ssmzoo.ops.dense_scan_torch import RESET, SKIP
from ssmzoo.ops.dispatch import needs_grad, op
from ssmzoo.ops.transforms import transformed

# Products of transitions pay in PyTorch for long sequences of few, small states: n^3 work against the cost of a step.
PARALLEL_FROM, PARALLEL_WIDTH = 256, 128  # steps, from; batch times n, up to (measured on a CPU)


def mix_transitions(A_dict: Tensor, weights: Tensor, p_norm: float = 1.0) -> Tensor:
    """T = M / |columns of M|_p with M = sum_k weights[..., k] A_dict[:, :, k].

    A_dict   (n n k)  row, column, matrix (the official layout, k last)
    weights  (... k)  usually a softmax over k
    returns  (... n n)

    A column of zeros gives NaN, as in the official code.
    """
    M = torch.einsum("ijk,...k->...ij", A_dict, weights)
    return M / torch.linalg.vector_norm(M, p_norm, dim=-2, keepdim=True)


def _check(
    A_dict,
    weights,
    inputs,
    p_norm=1.0,
    symbols=None,
    *,
    initial_state=None,
    mask=None,
    seq_idx=None,
    all_steps=True,
    parallel=None,
):
    sizes: dict[str, int] = {}
    expect("A_dict", A_dict, ("n", "n", "k"), sizes)
    if p_norm <= 0:
        raise ValueError(f"p_norm = {p_norm}, expected a positive number, usually between 1 and 2")
    if symbols is None:
        if weights.ndim == 2:
            raise ValueError(f"weights has shape {tuple(weights.shape)}, expected (b, l, k): give symbols with (s, k)")
        expect("weights", weights, ("b", "l", "k"), sizes)
        expect("inputs", inputs, ("b", "l", "n"), sizes)
    else:
        if symbols.is_floating_point() or symbols.is_complex() or symbols.dtype == torch.bool:
            raise ValueError(f"symbols has dtype {symbols.dtype}, expected an integer dtype such as int64")
        if symbols.device != A_dict.device:
            raise ValueError(f"symbols is on {symbols.device}, A_dict on {A_dict.device}; move them to one device")
        expect("symbols", symbols, ("b", "l"), sizes)
        expect("weights", weights, ("s", "k"), sizes)
        expect("inputs", inputs, ("s", "n") if inputs.ndim == 2 else ("b", "l", "n"), sizes)
    if initial_state is not None:
        expect("initial_state", initial_state, ("b", "n"), sizes)
    if mask is not None:
        expect("mask", mask, ("b", "l"), sizes)
        if mask.dtype != torch.bool or mask.device != A_dict.device:
            raise ValueError(
                f"mask is {mask.dtype} on {mask.device}, expected torch.bool on {A_dict.device} with True "
                "for real positions"
            )
    expect_floats(A_dict.device, A_dict=A_dict, weights=weights, inputs=inputs, initial_state=initial_state)
    expect_seq_idx(seq_idx, A_dict.device, sizes)


@op(check=_check)
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
            on_torch.check_codes(codes, T.shape[0])
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


def scan_with(backend: str):
    """dense_scan on the kernel registered under `backend`."""

    def run(
        A_dict,
        weights,
        inputs,
        p_norm=1.0,
        symbols=None,
        *,
        initial_state=None,
        mask=None,
        seq_idx=None,
        all_steps=True,
        parallel=None,
    ):
        dtype = compute_dtype(A_dict, weights, inputs)
        b, l = weights.shape[:2] if symbols is None else symbols.shape
        n = A_dict.shape[0]
        codes = step_codes(b, l, A_dict.device, symbols, mask, seq_idx)
        A_dict, weights, x = (v.to(dtype).contiguous() for v in (A_dict, weights, inputs))
        h0 = x.new_zeros(b, n) if initial_state is None else initial_state.to(dtype).contiguous()
        keep = all_steps or needs_grad(A_dict, weights, x, h0)
        if parallel is None:
            parallel = backend == "torch" and l >= PARALLEL_FROM and b * n <= PARALLEL_WIDTH and n <= 32
        if symbols is None:
            states, last = torch.ops.ssmzoo.dense_scan_mixture(
                A_dict, weights, x, codes, h0, float(p_norm), keep, parallel, backend
            )
        else:
            with torch.autocast(A_dict.device.type, enabled=False):
                T = mix_transitions(A_dict, weights, p_norm).contiguous()
            if x.ndim == 2:
                x = F.embedding((codes & (SKIP - 1)).clamp(max=len(x) - 1), x)  # the kernel reports bad symbols
            states, last = torch.ops.ssmzoo.dense_scan_symbols(T, x, codes, h0, keep, parallel, backend)
        return (states if all_steps else last.unsqueeze(1)).to(inputs.dtype), last

    return run


KERNELS["torch"] = DenseKernel(
    on_torch.symbols_forward, on_torch.symbols_backward, on_torch.mixture_forward, on_torch.mixture_backward
)
dense_scan.register("torch", composite=dense_scan.reference)(scan_with("torch"))
