"""Sending tokens to experts: sort the choices by expert, keep what fits, multiply every group by its own matrix.

    rows of expert e are neighbours:  row r reads token[r];   out_r = x_token[r] W_e   for  ends[e-1] <= r < ends[e]

Letters: t tokens, k choices per token, r rows (at most t k), e experts, d and f widths.
The whole dispatch is one stable sort, one gather, one grouped matmul per weight and one scatter-add: no loop over
tokens, no (t e) mask of the capacity, and shapes that do not depend on the routing when it is compiled.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops.dispatch import op
from ssmzoo.ops.eager import eager
from ssmzoo.ops.moe_dispatch import triton as grouped
from ssmzoo.ops.transforms import transformed

FEW_ROWS = 4


def check_router_logits(a) -> None:
    if a.gate.ndim != 2 or a.x.ndim < 1 or a.x.shape[-1] != a.gate.shape[0]:
        raise ValueError(f"x has shape {tuple(a.x.shape)} and gate {tuple(a.gate.shape)}, expected (... d) and (d e)")


@op(check=check_router_logits)
def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """How well every expert suits a token, before the softmax: x (... d), gate (d e) -> x gate (... e)

    In fp32 (float64 for float64 input), also under autocast: in bf16 two experts often tie.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide)[..., None] * gate.to(wide)).sum(-2)


class Groups(NamedTuple):
    """Which choices are computed, sorted by expert.

    choice (r)  position of the row in the flattened (t k) choices
    token (r)   the token that the row reads and writes
    ends (e)    int32, one past the last row of every expert; rows from ends[-1] on are computed by nobody
    counts (e)  choices per expert before anything is dropped
    """

    choice: Tensor
    token: Tensor
    ends: Tensor
    counts: Tensor


@torch.no_grad()
def group_by_expert(
    expert: Tensor, n_experts: int, capacity: int | Tensor | None = None, mask: Tensor | None = None
) -> Groups:
    """Sort choices by expert; of one expert's choices the first `capacity` in flattened (t k) order are kept.

    expert (t k)  integer choices;  mask (t)  False for tokens that are not routed at all (padding)
    capacity      one number, or one per expert (e)
    """
    t, k = expert.shape
    if mask is not None:
        expert = expert.masked_fill(~mask[:, None], n_experts)  # sorts behind every expert
    by_expert, choice = expert.flatten().sort(stable=True)
    bounds = torch.searchsorted(by_expert, torch.arange(n_experts + 1, device=expert.device))
    counts = bounds.diff()
    ends = bounds[1:]
    if capacity is not None:  # close the gaps that dropped choices leave, and put them behind
        position = torch.arange(t * k, device=expert.device) - bounds[by_expert]  # among the choices of its expert
        limit = F.pad(capacity, (0, 1))[by_expert] if isinstance(capacity, Tensor) and capacity.ndim else capacity
        fits = (position < limit) & (by_expert < n_experts)
        kept = counts.clamp(max=capacity)
        ends = kept.cumsum(0)
        slot = torch.where(fits, F.pad(ends - kept, (0, 1))[by_expert] + position, ends[-1] + (~fits).cumsum(0) - 1)
        choice = torch.empty_like(choice).scatter(0, slot, choice)
    return Groups(choice, choice // k, ends.to(torch.int32), counts)


def gather_rows(x: Tensor, groups: Groups) -> Tensor:
    """x (t d) -> the rows of the groups (r d)."""
    return x.index_select(0, groups.token)


def scatter_rows(rows: Tensor, weight: Tensor, groups: Groups, n_tokens: int) -> Tensor:
    """sum over the rows of every token of weight_r rows_r. rows (r d), weight (r) -> (t d) in the type of rows."""
    rows = rows * weight[:, None].to(rows.dtype)
    return rows.new_zeros(n_tokens, rows.shape[1]).index_add(0, groups.token, rows)


def grouped_matmul_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition of `grouped_matmul`."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    sizes.append(x.shape[0] - sum(sizes))
    out = [part @ w for part, w in zip(x.split(sizes), weight.unbind(0))]
    return torch.cat([*out, x.new_zeros(sizes[-1], weight.shape[2])])


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply consecutive groups of rows by one matrix each.

        out_r = x_r W_e   for the rows ends[e-1] <= r < ends[e],   0 for rows from ends[-1] on

    x (r d), weight (e d f), ends (e) int32 non-decreasing -> (r f). Raises ValueError when shapes disagree.
    Computed by torch's grouped_mm; on a GPU by our kernels where that would loop (grouped.py), and by a loop over the
    groups in float64, old versions and, on a CPU, for widths that are not a multiple of 16 bytes. There grouped_mm is
    also the faster one: see benchmarks/moe.py.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"grouped_matmul wants x (r d), weight (e d f); got {tuple(x.shape)}, {tuple(weight.shape)}")
    if ends.shape != weight.shape[:1]:
        raise ValueError(f"ends must have one entry per expert ({weight.shape[0]}), got {tuple(ends.shape)}")
    if transformed():
        return _every_expert(x, weight, ends)
    if not torch.is_grad_enabled() and eager(x, weight, ends) and x.is_cpu and len(x) <= FEW_ROWS:
        return _row_by_row(x, weight, ends)
    return _grouped_matmul(x, weight, ends)


def _row_by_row(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_matmul` for decoding: starting torch's costs more than a few products of a row."""
    group = torch.searchsorted(ends, torch.arange(len(x), dtype=ends.dtype), right=True).tolist()
    rows = [row @ weight[e] if e < len(weight) else x.new_zeros(weight.shape[2]) for row, e in zip(x, group)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[2])


def _every_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_matmul` for torch.func: all rows times all matrices, of which each row keeps its own."""
    group = (torch.arange(x.shape[0], device=x.device)[:, None] >= ends).sum(-1)  # (r), e for rows of nobody
    mine = group[:, None] == torch.arange(weight.shape[0], device=x.device)  # (r e)
    return torch.where(mine[..., None], torch.einsum("rd,edf->ref", x, weight), 0).sum(1)


def why_not_grouped_mm(x: Tensor, width: int) -> str | None:
    """Why torch's grouped_mm cannot multiply rows x (r d) to a width, None when it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no nn.functional.grouped_mm"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"wants float32, bfloat16 or float16, got {x.dtype}"
    if x.shape[1] * x.element_size() % 16 or width * x.element_size() % 16:
        return f"wants widths of a multiple of 16 bytes, got {x.shape[1]} and {width} elements"
    return "no rows" if x.shape[0] == 0 else None


# One operator to torch.compile, whose model of grouped_mm knows bfloat16 only and which would break on the loop.
@torch.library.custom_op("ssmzoo::grouped_matmul", mutates_args=())
def _grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    why = why_not_grouped_mm(x, weight.shape[2])
    if grouped.takes(x, weight) and (why or grouped.torch_waits(x)):
        return grouped.multiply(x, weight, ends)
    if why:
        return grouped_matmul_reference(x, weight, ends)
    out = F.grouped_mm(x, weight, offs=ends)
    if out.is_cpu:
        out[int(ends[-1]) :] = 0  # left unwritten by grouped_mm
    else:  # without waiting for the device
        out.masked_fill_(torch.arange(len(out), device=out.device)[:, None] >= ends[-1], 0)
    return out


@torch.library.custom_op("ssmzoo::grouped_outer", mutates_args=())
def _grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """sum over the rows of every group of x_r y_r^T. x (r d), y (r f) -> (e d f)"""
    why = why_not_grouped_mm(x, y.shape[1])
    if grouped.takes(x, y) and (why or grouped.torch_waits(x)):
        return grouped.outer(x, y, ends)
    if why is None:
        return F.grouped_mm(x.t(), y, offs=ends)
    out = x.new_zeros(len(ends), x.shape[1], y.shape[1])
    start = 0
    for group, end in zip(out, ends.tolist()):
        torch.mm(x[start:end].t(), y[start:end], out=group)
        start = end
    return out


@_grouped_matmul.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@_grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    return (
        _grouped_matmul(gradient, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None,
        _grouped_outer(x, gradient, ends) if ctx.needs_input_grad[1] else None,
        None,
    )


_grouped_matmul.register_autograd(_backward, setup_context=_keep)
