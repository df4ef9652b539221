"""Rows of a large table that every token finds for itself: products with them, and their weighted sum.

    dot_rows   s_j = <table_{entry_j}, x>           sum_rows   y = sum over j of weight_j table_{entry_j}

Each is the other's gradient: of x and of the weights. Torch's functions copy the rows first, once per token.
t tokens (any leading axes), k rows per token, e rows of the table, d width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import expect_floats
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable


def _check(a, given: Tensor, name: str, axes: tuple[int, ...]) -> None:
    expect_floats(a, {}, table="ed", **{name: "..."})
    if a.entry.dtype != torch.int64:
        raise ValueError(f"entry has dtype {a.entry.dtype}, expected int64, numbers of the table's rows")
    if tuple(given.shape) != axes:
        shapes = f"table has shape {tuple(a.table.shape)} and entry {tuple(a.entry.shape)}"
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {axes}: {shapes}")


def check_dot(a) -> None:
    _check(a, a.x, "x", (*a.entry.shape[:-1], *a.table.shape[1:]))


def check_sum(a) -> None:
    _check(a, a.weight, "weight", tuple(a.entry.shape))


@op(check=check_dot)
def dot_rows(table: Tensor, entry: Tensor, x: Tensor) -> Tensor:
    """Products of x with the rows that entry names.

    table (e d), entry (... k) int64 from 0 to e - 1, x (... d) -> (... k) in x's dtype

    Raises ValueError for shapes or dtypes that do not fit, IndexError for a row that the table lacks.
    """
    return (table[entry] * x.unsqueeze(-2)).sum(-1).to(x.dtype)


@op(check=check_sum)
def sum_rows(table: Tensor, entry: Tensor, weight: Tensor) -> Tensor:
    """The sum of the rows that entry names, by their weights.

    table (e d), entry and weight (... k) -> (... d) in weight's dtype

    Raises as `dot_rows` does.
    """
    return (table[entry] * weight.unsqueeze(-1)).sum(-2).to(weight.dtype)


def dot_torch(a) -> Tensor:
    return torch.einsum("...d,...kd->...k", a.x, F.embedding(a.entry, a.table).to(a.x.dtype))


def sum_torch(a) -> Tensor:
    return torch.einsum("...k,...kd->...d", a.weight, F.embedding(a.entry, a.table).to(a.weight.dtype))


DOT = Differentiable("dot_rows", dot_rows.Arguments, twice=dot_torch)
SUM = Differentiable("sum_rows", sum_rows.Arguments, twice=sum_torch)
