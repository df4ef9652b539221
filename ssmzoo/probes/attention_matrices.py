"""Hidden attention: the causal matrix that every channel of a selective scan multiplies its input with.

    alpha[i, j] = sum_n C_i[n] exp(A[n] (S_i - S_j)) delta_j B_j[n],   j <= i,   S = cumulative sum of delta
    y_i = sum_j alpha[i, j] u_j + D u_i

The exponents are differences of sums of logarithms, never ratios of products, which would underflow.
With convolution M (banded Toeplitz), SiLU and gate folded in:  F = diag(SiLU(z)) alpha diag(sigmoid(c)) M,
y = F x + SiLU(z) D u when the convolution has no bias; c is the convolution's output before its SiLU.

Softmax attention, where a tap collected it (`Attention`), has its weights in the place of alpha, head by head, so that
everything here compares both.

b batch, e channels, l length, n state size.
Source: Ali, Zimerman & Wolf (arXiv 2403.01590); the folded form: arXiv 2405.16504.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmzoo.probes.scan import DenseScan, Scan
from ssmzoo.probes.softmax_attention import Attention

MATRIX_BYTES = 1 << 30
CHUNK_BYTES = 1 << 25  # matrices worked on at a time: faster than more at once, and the work stays small
WORK = 5  # matrices that the work on one of them holds beside it


def attention(scan: Scan | Attention, reorder: bool = True, max_bytes: int = MATRIX_BYTES) -> Tensor:
    """alpha (b e l l) of the scan's channels; rows are outputs, columns inputs.

    reorder    index both axes by the model's tokens, whatever the direction and order of the scan; False: by its own
               steps
    max_bytes  what the matrices and the work on them may take; a ValueError names the bound

    Where states are fused on a map before they are read (Spatial-Mamba) the rows are fused likewise and no longer
    causal; where tokens are sorted softly in front of the scan the columns are those of the unsorted tokens.
    """
    scan.whole("attention")
    b, e, l = scan.batch, len(scan.channels), scan.length
    one = matrix_bytes(scan)
    if one * (e + WORK) > max_bytes:
        raise ValueError(
            f"{b} x {e} matrices of {l} x {l} take {one * (e + WORK):,} bytes, more than max_bytes = "
            f"{max_bytes:,}: choose fewer channels (scan.take), single rows (attention_rows), a shorter "
            f"input, or raise max_bytes"
        )
    chunk = max(1, min(e, (max_bytes // one - e) // WORK, CHUNK_BYTES // one))
    parts = [scan if chunk >= e else scan.take(range(i, min(i + chunk, e))) for i in range(0, e, chunk)]
    alpha = [_matrices(part) for part in parts]
    alpha = alpha[0] if len(alpha) == 1 else torch.cat(alpha, dim=1)
    return to_tokens(alpha, scan) if reorder and isinstance(scan, Scan) else alpha


def matrix_bytes(scan: Scan | Attention) -> int:
    """What the matrices of one channel, or head, take."""
    return (scan.y.element_size() * scan.batch * scan.length**2) or 1


def _matrices(scan: Scan | Attention) -> Tensor:
    """alpha (b e l l) by steps, holding about WORK of them at a time."""
    if isinstance(scan, Attention):
        return scan.weights()
    l, S = scan.length, scan.delta.cumsum(-1)  # (b e l)
    causal = causal_mask(scan)
    span = (S[..., :, None] - S[..., None, :]).masked_fill(~causal, 0.0)  # (b e i j)
    C, B = scan.read(), scan.write()  # (b e l n)
    C = torch.ones_like(B) if scan.fusion is not None else C  # read behind the fusion
    alpha: Tensor | float = 0.0
    for i in range(scan.A.shape[1]):
        alpha = alpha + torch.exp(scan.A[:, i, None, None] * span) * C[..., :, None, i] * B[..., None, :, i]
    alpha = alpha.masked_fill(~causal, 0.0)
    if scan.own is not None:
        own = scan.own * (C * scan.per_channel(scan.B)).sum(-1)
        alpha = alpha - torch.diag_embed(alpha.diagonal(dim1=2, dim2=3) - own)
    if scan.fusion is not None:
        columns = alpha.movedim(3, 1).flatten(0, 1)  # (bl e l): every column is a map of states
        alpha = scan.fusion(columns).unflatten(0, (-1, l)).movedim(1, 3) * scan.read()
    return alpha


def causal_mask(scan: Scan) -> Tensor:
    """Which step may see which, (l l) or (b 1 l l) with documents."""
    l = scan.length
    causal = torch.ones(l, l, dtype=torch.bool, device=scan.u.device).tril()
    if scan.seq_idx is None:
        return causal
    changes = (scan.seq_idx[:, 1:] != scan.seq_idx[:, :-1]).cumsum(1)
    document = torch.nn.functional.pad(changes, (1, 0))  # (b l)
    return causal & (document[:, None, :, None] == document[:, None, None, :])


def to_tokens(matrix: Tensor, scan: Scan) -> Tensor:
    """(b e l l) indexed by steps -> by tokens, channel by channel."""
    tokens = scan.step_tokens()
    if tokens is not None:
        step = tokens.argsort(-1)  # (e l) or (b e l): step of every token
        matrix = matrix.gather(2, step[..., :, None].expand_as(matrix))
        matrix = matrix.gather(3, step[..., None, :].expand_as(matrix))
    return matrix if scan.mixture is None else matrix @ scan.mixture[:, None]


def attention_rows(scan: Scan | Attention, rows: Sequence[int]) -> Tensor:
    """Some rows of alpha, (b e rows l), by steps, in O(l n) per channel and row."""
    scan.whole("attention")
    if isinstance(scan, Attention):
        return scan.weights(rows)
    if scan.fusion is not None:
        return attention(scan, reorder=False)[:, :, list(rows)]
    S, C, B = scan.delta.cumsum(-1), scan.read(), scan.write()
    causal, steps = causal_mask(scan), torch.arange(scan.length, device=S.device)
    out = []
    for row in rows:
        seen = causal[..., row, :].expand_as(S)
        span = (S[..., row, None] - S).masked_fill(~seen, 0.0)[..., None]
        weights = (torch.exp(scan.A[:, None] * span) * B * C[:, :, row, None]).sum(-1).masked_fill(~seen, 0.0)
        if scan.own is not None:
            own = scan.own[..., row] * (C[:, :, row] * scan.per_channel(scan.B)[:, :, row]).sum(-1)
            weights = torch.where(steps == row, own[..., None], weights)
        out.append(weights)
    return torch.stack(out, dim=2)


def attention_row(scan: Scan | Attention, row: int) -> Tensor:
    """One row of alpha, (b e l), by steps."""
    return attention_rows(scan, [row])[:, :, 0]


def carried(scan: Scan) -> Tensor:
    """What the state before the first step adds to every output, (b e l), by steps: <C, exp(A S) h_0>."""
    decay = torch.exp(scan.delta.cumsum(-1)[..., None] * scan.A[:, None])  # (b e l n)
    y = (decay * scan.initial_state[:, :, None] * scan.read()).sum(-1)
    if scan.seq_idx is None:
        return y
    first = torch.nn.functional.pad((scan.seq_idx[:, 1:] == scan.seq_idx[:, :-1]).long().cumprod(1), (1, 0), value=1)
    return y * first[:, None]


def scan_output(scan: Scan, max_bytes: int = MATRIX_BYTES) -> Tensor:
    """alpha u + D u (b e l), by steps: the scan's output before its gate."""
    y = torch.einsum("beij,bej->bei", attention(scan, False, max_bytes), scan.u)
    y = y if scan.D is None else y + scan.D[:, None] * scan.u
    return y if scan.initial_state is None else y + carried(scan)


def exactness(scan: Scan | Attention, max_bytes: int = MATRIX_BYTES) -> float:
    """|alpha u + D u, gated where the operator gates, - y| / |y|"""
    if isinstance(scan, Attention):
        y = attention(scan, False, max_bytes) @ scan.v
        return float((y - scan.y).norm() / scan.y.norm().clamp(min=1e-30))
    y = scan_output(scan, max_bytes)
    y = y if scan.z is None else y * torch.nn.functional.silu(scan.z)
    return float((y - scan.y).norm() / scan.y.norm().clamp(min=1e-30))


def implicit_attention(scan: Scan, reorder: bool = True) -> Tensor:
    """F (b e l l): alpha with the convolution, its SiLU and the gate folded in, without skip D and bias."""
    if scan.conv is None:
        raise ValueError(f"{scan.name} has no causal convolution in front of its scan; `attention` is all there is")
    scan.whole("attention")
    l, taps = scan.u.shape[-1], scan.conv.weight.shape[1]
    lag = torch.arange(l)[:, None] - torch.arange(l)[None]  # i - j
    M = scan.conv.weight[:, (taps - 1 - lag).clamp(0, taps - 1)] * ((lag >= 0) & (lag < taps)).to(scan.u.device)
    F_ = (attention(scan, reorder=False) * scan.conv.output().sigmoid()[..., None, :]) @ M
    if scan.z is not None:
        F_ = torch.nn.functional.silu(scan.z)[..., None] * F_
    return to_tokens(F_, scan) if reorder else F_


def class_row(scan: Scan, token: int, missing_decay: bool = False) -> Tensor:
    """How much `token` reads from every other token, (b e l): forward channels before it, backward ones behind it.

    scan           two directions of e channels each, as in Vim; column `token` itself is 0
    missing_decay  as the released code has it: without the factor exp(delta A) of the reading step itself
    """
    if scan.directions != 2:
        raise ValueError(
            f"{scan.name} scans in {scan.directions} directions; the row of a class token in the middle needs two"
        )
    e, l = scan.total // 2, scan.u.shape[-1]
    parts = []
    for half, row in ((range(e), token), (range(e, 2 * e), l - 1 - token)):
        part = scan.take(half)
        if missing_decay:
            part.delta = part.delta.index_fill(-1, torch.tensor([row], device=part.delta.device), 0.0)
        weights = attention_row(part, row)
        parts.append(weights.masked_fill(torch.arange(l, device=weights.device) == row, 0.0))
    return parts[0] + parts[1].flip(-1)


def dense_map(scan: DenseScan) -> Tensor:
    """How strongly SD-SSM carries token j to step i: the spectral norm of T_i ... T_{j+1}, (b l l)"""
    T, l = scan.transitions, scan.transitions.shape[1]
    eye = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
    out = T.new_zeros(len(T), l, l)
    carried = T.new_zeros(len(T), l, *T.shape[-2:])
    for i in range(l):
        carried[:, :i] = T[:, i, None] @ carried[:, :i]
        carried[:, i] = eye
        out[:, i, : i + 1] = torch.linalg.matrix_norm(carried[:, : i + 1], 2)
    return out
