"""What tracing programs need: scans as one loop of any length, and models whose state goes in and out as tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ssmzoo.ops as ops
from ssmzoo.layers.state import map_state
from ssmzoo.ops.checks import compute_dtype


@contextlib.contextmanager
def plain_operators() -> Iterator[None]:
    """Within the block the zoo's operators are made of torch's own, and the selective scan is one loop over time."""
    with warnings.catch_warnings(), torch.no_grad(), ops.backend("reference"), ops.observe(selective_scan_fn=one_loop):
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        yield


def one_loop(call, *args, **kwargs):
    """`ssmzoo.ops.selective_scan_fn` by torch's higher-order scan, which becomes a loop of the program.

    With documents (seq_idx), complex A or one position the operator itself, `call`, is traced.
    """
    a = ops.selective_scan_fn.Arguments(*args, **kwargs)
    if a.seq_idx is not None or a.A.is_complex() or a.u.shape[2] == 1:
        return call(*args, **kwargs)
    from torch._higher_order_ops.scan import scan

    dtype = compute_dtype(a.u, a.delta, a.A, a.B, a.C)
    x, dt, A = a.u.to(dtype), a.delta.to(dtype), a.A.to(dtype)
    dt = dt if a.delta_bias is None else dt + a.delta_bias.to(dtype)[:, None]
    dt = F.softplus(dt) if a.delta_softplus else dt
    varying = {name: _steps(M.to(dtype), x.shape[1]) for name, M in (("B", a.B), ("C", a.C))}
    constant = {name: varying.pop(name) for name, M in (("B", a.B), ("C", a.C)) if M.ndim == 2}
    start = 0 * x[:, :, :1] if a.initial_state is None else a.initial_state.to(dtype)

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x_t, dt_t, *rest = now
        M = constant | dict(zip(varying, rest))
        h = torch.exp(dt_t[..., None] * A) * h + (dt_t * x_t)[..., None] * M["B"]  # (b e n)
        return h, (h * M["C"]).sum(-1)

    sequences = (x.permute(2, 0, 1), dt.permute(2, 0, 1), *varying.values())  # time first
    last, y = scan(step, start + torch.zeros_like(A), sequences, dim=0)
    y = y.permute(1, 2, 0)
    y = y if a.D is None else y + a.D.to(dtype)[:, None] * x
    y = (y if a.z is None else y * F.silu(a.z.to(dtype))).to(a.u.dtype)
    return (y, last) if a.return_last_state else y


def _steps(M: Tensor, channels: int) -> Tensor:
    """(e n) as it is; (b n l) or (b g n l) -> (l b e n)."""
    if M.ndim == 2:
        return M
    M = M.unsqueeze(1) if M.ndim == 3 else M
    return M.permute(3, 0, 1, 2).repeat_interleave(channels // M.shape[1], dim=2)


class WithState(nn.Module):
    """A sequence model as a function of tensors: (ids (b l), *state) -> (logits (b l v), *state after them).

    template  a state of the model, for its form
    """

    def __init__(self, model: nn.Module, template: Any):
        super().__init__()
        self.model, self.template = model, template

    def forward(self, input_ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        rest = iter(state)
        out = self.model(input_ids, map_state(lambda _: next(rest), self.template))
        return out.logits, *tensors_of(out.state)


def tensors_of(state: Any) -> list[Tensor]:
    """The tensors of a state, in order."""
    found: list[Tensor] = []
    map_state(lambda tensor: found.append(tensor) or tensor, state)
    return found


@torch.no_grad()
def first_state(model: nn.Module, batch: int = 2) -> Any | None:
    """The state before the first token as tensors of zeros; None for a model whose state is not of one size, or does
    not begin with zeros."""
    ids = torch.arange(2).expand(batch, 2)
    one, two = model(ids[:, :1]), model(ids)
    if [t.shape for t in tensors_of(one.state)] != [t.shape for t in tensors_of(two.state)]:
        return None
    zeros = map_state(torch.zeros_like, one.state)
    same = torch.allclose(model(ids[:, :1], zeros).logits, one.logits, rtol=1e-4, atol=1e-6)
    return zeros if same else None
