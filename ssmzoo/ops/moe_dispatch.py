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


class Groups(NamedTuple):
    """Which choices are computed, sorted by expert.

    choice (r)  place of the row in the flattened (t k) choices
    token (r)   the token that the row reads and writes
    ends (e)    int32, one past the last row of every expert
    live (r)    False for rows that no expert computes (they stand at the end); None when there are none
    counts (e)  choices per expert before anything is dropped
    """

    choice: Tensor
    token: Tensor
    ends: Tensor
    live: Tensor | None
    counts: Tensor


@torch.no_grad()
def group_by_expert(expert: Tensor, n_experts: int, capacity: int | Tensor | None = None,
                    mask: Tensor | None = None) -> Groups:
    """Sort choices by expert; of one expert's choices the first `capacity` in flattened (t k) order are kept.

    expert (t k)  integer choices;  mask (t)  False for tokens that are not routed at all (padding)
    """
    t, k = expert.shape
    if mask is not None:
        expert = expert.masked_fill(~mask[:, None], n_experts)  # sorts behind every expert
    by_expert, choice = expert.flatten().sort(stable=True)
    bounds = torch.searchsorted(by_expert, torch.arange(n_experts + 1, device=expert.device))
    starts, counts = bounds[:-1], bounds.diff()
    if capacity is not None:
        place = torch.arange(t * k, device=expert.device) - bounds[by_expert]  # among the choices of its expert
        fits = (place < capacity) & (by_expert < n_experts)
        kept = counts.clamp(max=capacity)
        starts = kept.cumsum(0) - kept
        total = kept.sum()
        behind = total + (~fits).cumsum(0) - 1
        slot = torch.where(fits, F.pad(starts, (0, 1))[by_expert] + place, behind)
        choice = torch.empty_like(choice).scatter(0, slot, choice)
    else:
        kept, total = counts, bounds[-1]
    ends = (starts + kept).to(torch.int32)
    live = None
    if capacity is not None or mask is not None:
        if expert.is_cpu and not torch.compiler.is_compiling():
            choice = choice[:int(total)]
        else:  # a data-dependent length would wait for the GPU or split the graph
            live = torch.arange(t * k, device=expert.device) < total
    return Groups(choice, choice // k, ends, live, counts)


def gather_rows(x: Tensor, groups: Groups) -> Tensor:
    """x (t d) -> the rows of the groups (r d). Rows that nobody computes are zero, and so is their gradient."""
    rows = x.index_select(0, groups.token)
    return rows if groups.live is None else rows.masked_fill(~groups.live[:, None], 0)


def scatter_rows(rows: Tensor, weight: Tensor, groups: Groups, n_tokens: int) -> Tensor:
    """sum over the rows of every token of weight_r rows_r. rows (r d), weight (r) -> (t d) in the type of rows."""
    rows = rows * weight[:, None].to(rows.dtype)
    if groups.live is not None:  # a grouped kernel leaves them unwritten
        rows = rows.masked_fill(~groups.live[:, None], 0)
    return rows.new_zeros(n_tokens, rows.shape[1]).index_add(0, groups.token, rows)


def grouped_matmul_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition of `grouped_matmul`, for any dtype and width; rows that belong to nobody come out as zero."""
    sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
    sizes.append(x.shape[0] - sum(sizes))
    out = [part @ w for part, w in zip(x.split(sizes), weight.unbind(0))]
    return torch.cat([*out, x.new_zeros(sizes[-1], weight.shape[2])])


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply consecutive groups of rows by one matrix each.

        out_r = x_r W_e   for the rows ends[e-1] <= r < ends[e]

    x (r d), weight (e d f), ends (e) int32 non-decreasing -> (r f). Rows from ends[-1] on belong to nobody: their
    output is unspecified, and so is the gradient of x there. Raises ValueError when shapes disagree.
    Two implementations: torch's grouped_mm, and the reference for what that refuses (float64, widths that are not a
    multiple of 16 bytes). On a CPU the former is also the faster one: see benchmarks/moe.py.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"grouped_matmul wants x (r d), weight (e d f); got {tuple(x.shape)}, {tuple(weight.shape)}")
    if ends.shape != weight.shape[:1]:
        raise ValueError(f"ends must have one entry per expert ({weight.shape[0]}), got {tuple(ends.shape)}")
    if why_not_grouped_mm(x, weight) is not None:
        return grouped_matmul_reference(x, weight, ends)
    return _DenseGradient.apply(F.grouped_mm(x, weight, offs=ends))


def why_not_grouped_mm(x: Tensor, weight: Tensor) -> str | None:
    """Why torch's grouped_mm cannot serve a call, None when it can."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no nn.functional.grouped_mm"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.dtype != weight.dtype:
        return f"wants both in float32, bfloat16 or float16, got {x.dtype} and {weight.dtype}"
    if x.shape[1] * x.element_size() % 16 or weight.shape[2] * x.element_size() % 16:
        return f"wants widths of a multiple of 16 bytes, got {x.shape[1]} and {weight.shape[2]} elements"
    return "no rows" if x.shape[0] == 0 else None


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: the backward of grouped_mm refuses an expanded one (that of a sum)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.contiguous()
