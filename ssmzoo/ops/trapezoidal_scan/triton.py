"""trapezoidal_scan on a GPU: the kernels of Mamba-2's scan, told what a token's own positions weigh among themselves.

A token of r ranks is r positions, of which the first decays; w_s = gamma_s + beta_{s+1} is their weight for all later
tokens, and gamma_s that for the token itself, which sees all its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import why_not_float
from ssmzoo.ops.library import Differentiable, Kernel
from ssmzoo.ops.ssd import Recurrence
from ssmzoo.ops.ssd import triton as ssd
from ssmzoo.ops.trapezoidal_scan import rank_inputs, rotary_trapezoidal_scan, trapezoidal_scan
from ssmzoo.ops.trapezoidal_scan.torch import rotary_trapezoidal_scan_torch
from ssmzoo.ops.triton import DEVICE, INTERPRETED, MISSING, power_of_2
from ssmzoo.ops.triton.variants import DTYPES, Variant, meta, train

PASSES = ssd.PASSES


class Inputs(NamedTuple):
    """A Recurrence of positions, `ranks` per token, with the weights `diagonal` (b l h) inside a token."""

    x: Tensor
    dt: Tensor
    log_decay: Tensor
    B: Tensor
    C: Tensor
    diagonal: Tensor
    initial_states: Tensor | None
    seq_idx: Tensor | None
    ranks: int

    @property
    def recurrence(self) -> Recurrence:
        return Recurrence(*self[:5], None, self.initial_states, self.seq_idx)


def empty_results(a: Inputs) -> tuple[Tensor, Tensor]:
    """Uninitialised y (b l h p) and last state (b h p n), fp32."""
    b, _, h, p = a.x.shape
    new = a.x.new_empty
    return new(a.x.shape, dtype=torch.float32), new(b, h, p, a.B.shape[3], dtype=torch.float32)


SCAN = Differentiable(
    "trapezoidal_positions", Inputs, ("y", "state"), saved="saved", like=empty_results, refer="reference"
)
KERNEL = SCAN.kernels["triton"] = Kernel(
    lambda a, save: ssd.forward(a.recurrence, save, a.diagonal, a.ranks),
    lambda a, saved, dy, dlast: ssd.backward(a.recurrence, saved, dy, dlast, a.diagonal, a.ranks),
    lambda a: ssd.saved(a.recurrence),
)


def why_not(a) -> str | None:
    (r, _, n), width = a.k.shape[2:], ssd.WIDEST
    if a.v.numel() == 0 or n == 0 or r == 0:
        return "is given nothing to do"
    if n > width or r > ssd.CHUNK:
        return f"holds up to {width} states per channel and {ssd.CHUNK} ranks on the chip, got {n} and {r}"
    if not INTERPRETED and a.v.dtype == torch.float32:
        return "multiplies 16-bit values only; the torch form is exact for float32"
    return why_not_float(a.v, a.k, a.q, a.a, a.gamma, a.beta, a.D, a.mimo, a.initial_state)


@trapezoidal_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)
def trapezoidal_scan_triton(a) -> tuple[Tensor, Tensor]:
    r = a.k.shape[2]
    ranks = power_of_2(r)  # so that tokens do not lie across chunks; what is added has neither key nor value
    x = a.v.unsqueeze(2) if a.mimo is None else rank_inputs(a.v, a.mimo, torch.float32)  # (b l r h p)

    def positions(t: Tensor) -> Tensor:  # (b l r ...) -> (b l*ranks ...)
        if ranks > r:
            t = F.pad(t, (0, 0) * (t.ndim - 3) + (0, ranks - r))
        return t.flatten(1, 2)

    def of_tokens(t: Tensor) -> Tensor:  # (b l h) -> (b l*ranks h)
        return t if ranks == 1 else t.repeat_interleave(ranks, dim=1)

    gamma = a.gamma.float()
    weight = gamma + F.pad(a.beta[:, 1:].float(), (0, 0, 0, 1))
    decay = F.pad(a.a.float()[:, :, None], (0, 0, 0, ranks - 1)).flatten(1, 2)  # a token decays once
    given = Inputs(
        positions(x),
        of_tokens(weight),
        decay,
        positions(a.k),
        positions(a.q),
        of_tokens(gamma),
        a.initial_state,
        None if a.seq_idx is None else of_tokens(a.seq_idx),
        ranks,
    )
    y, state = SCAN(given, "triton")
    return y.unflatten(1, (-1, ranks))[:, :, :r] + x * a.D.float()[:, None], state


rotary_trapezoidal_scan.register("triton", device=DEVICE, missing=MISSING, unsupported=why_not)(
    rotary_trapezoidal_scan_torch  # which turns keys and queries, and calls the scan above
)


def variants() -> Iterator[Variant]:
    def call(dtype="bf16", sizes=(8, 2048, 32, 64), n=128, ranks=1, more=False):
        (b, l, h, p), kind = sizes, DTYPES[dtype]
        x = meta(b, l * ranks, h, p, dtype=kind if ranks == 1 else torch.float32)
        B, C = (meta(b, l * ranks, h, n) for _ in range(2))  # rotated in fp32
        dt, decay, diagonal = (meta(b, l * ranks, h) for _ in range(3))
        first, seq_idx = (meta(b, h, p, n), meta(b, l * ranks, dtype=torch.int32)) if more else (None, None)
        a = Inputs(x, dt, decay, B, C, diagonal, first, seq_idx, ranks)
        return lambda: train(KERNEL, a)

    yield Variant("bf16, b 8, l 2048, h 32, p 64, n 128", call(), typical=True)
    yield Variant("fp16, packed", call("fp16", more=True))
    yield Variant("bf16, 4 ranks, packed", call(ranks=4, more=True))
    yield Variant("bf16, p 20, n 5, 2 ranks", call(sizes=(2, 100, 4, 20), n=5, ranks=2))
