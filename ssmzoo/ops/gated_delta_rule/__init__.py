"""The gated delta rule: a linear recurrence that forgets, and overwrites what a key held instead of adding to it.

    S <- exp(g_t) S          u_t = beta_t (v_t - S^T k_t)          S <- S + k_t u_t^T          y_t = S^T q_t

that is S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T: the state decays first, and the delta
reads the decayed state. g is one number per head (Gated DeltaNet) or one per channel of the key (Kimi delta attention).
With |k| = 1 the eigenvalue of the delta along k is 1 - beta: a beta between 1 and 2 makes it negative, which lets the
state flip and so count modulo two; a diagonal selective scan cannot.

Letters: b batch, l length, h heads, n width of a key, p width of a value, c chunks.
Source: Yang et al. 2024 (arXiv 2412.06464), Kimi Linear (arXiv 2510.26692); negative eigenvalues: Grazzi et al. 2024
(arXiv 2411.12537); fla-org/flash-linear-attention ops/gated_delta_rule and ops/kda for conventions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype, expect_floats, expect_seq_idx, resets
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable, without

CHUNK = 64


def check(a) -> None:
    g = "blhn" if a.g.ndim == 4 else "blh"
    sizes = expect_floats(a, {}, q="blhn", k="blhn", v="blhp", g=g, beta="blh", initial_state="bhnp")
    expect_seq_idx(a.seq_idx, a.q.device, sizes)
    if a.chunk_size < 1:
        raise ValueError(f"chunk_size = {a.chunk_size}, expected at least 1")


@op(check=check)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Run the gated delta rule over whole sequences, or over one more token of each.

    q, k      (b l h n)  queries, already scaled (by n^-1/2 in the papers), and keys, normally of length 1
    v         (b l h p)  values
    g         (b l h) or (b l h n)  logarithm of the decay per head or per channel of the key, at most 0
    beta      (b l h)    how much of the old value is overwritten: in [0, 1], or [0, 2] with negative eigenvalues
    initial_state (b h n p)  state before the first position, zero when missing
    seq_idx   (b l) int  where it changes from t-1 to t, the state is set to 0 before t
    chunk_size           positions per chunk of the PyTorch form: an upper bound that backends may go below
    returns   (b l h p) in v's dtype and the last state (b h n p), fp32 (float64 for float64 input)

    A position with beta = 0 and g = 0 leaves the state as it is (padding). Raises ValueError naming the argument, its
    shape and the one expected.
    """
    (b, l, h, n), p, dtype = q.shape, v.shape[3], compute_dtype(q, k, v, g, beta)
    q, k, u, decay, beta = (t.to(dtype) for t in (q, k, v, g, beta))
    decay = decay.exp().reshape(b, l, h, -1, 1)  # (b l h n|1 1)
    state = q.new_zeros(b, h, n, p) if initial_state is None else initial_state.to(dtype)
    reset = None if seq_idx is None else resets(seq_idx).view(b, l, 1, 1, 1)
    ys = []
    for t in range(l):
        if reset is not None:
            state = torch.where(reset[:, t], 0.0, state)
        state = decay[:, t] * state
        old = (state * k[:, t, ..., None]).sum(-2)  # (b h p)
        delta = beta[:, t, :, None] * (u[:, t] - old)
        state = state + k[:, t, ..., None] * delta[..., None, :]
        ys.append((state * q[:, t, ..., None]).sum(-2))
    y = torch.stack(ys, dim=1) if ys else u
    return y.to(v.dtype), state


Inputs = without(gated_delta_rule.Arguments, "chunk_size")


def empty_results(a: Inputs) -> tuple[Tensor, Tensor]:
    """Uninitialised y (as v, contiguous) and last state (b h n p)."""
    b, _, h, n = a.q.shape
    state = a.q.new_empty(b, h, n, a.v.shape[3], dtype=compute_dtype(a.q, a.k, a.v, a.g, a.beta))
    return a.v.new_empty(a.v.shape), state


RULE = Differentiable("gated_delta_rule", Inputs, ("y", "state"), saved="saved", like=empty_results, refer="reference")
