"""dot_rows and sum_rows on our compiled CPU kernels (table_rows.c), which read rows where they lie."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from ssmzoo.ops.eager import why_not_eager
from ssmzoo.ops.library import Kernel
from ssmzoo.ops.native import kernel
from ssmzoo.ops.table_rows import DOT, SUM, dot_rows, sum_rows

PRODUCTS, MISSING = kernel("ssmzoo_dot_rows")
SUMS, _ = kernel("ssmzoo_sum_rows")
SPREAD, _ = kernel("ssmzoo_spread_rows")


def _call(function, table: Tensor, entry: Tensor, x: Tensor, weight: Tensor) -> None:
    """One of the two, or the table, is what is computed."""
    k, (e, d) = entry.shape[-1], table.shape
    given = table.data_ptr(), entry.data_ptr(), x.data_ptr(), weight.data_ptr()
    function(struct.pack("9q", *given, entry.numel() // k, k, e, d, torch.get_num_threads()))


def products(table: Tensor, entry: Tensor, x: Tensor) -> Tensor:
    s = x.new_empty(entry.shape)
    _call(PRODUCTS, table.contiguous(), entry.contiguous(), x.contiguous(), s)
    return s


def sums(table: Tensor, entry: Tensor, weight: Tensor) -> Tensor:
    y = weight.new_empty(*entry.shape[:-1], table.shape[1])
    _call(SUMS, table.contiguous(), entry.contiguous(), y, weight.contiguous())
    return y


def spread(table: Tensor, entry: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the table: to row entry_j of every token weight_j x."""
    grad = x.new_empty(table.shape)
    _call(SPREAD, grad, entry.contiguous(), x.contiguous(), weight.contiguous())
    return grad


def dot_backward(a, _, ds: Tensor) -> dict[str, Tensor]:
    return {"table": spread(a.table, a.entry, a.x, ds), "x": sums(a.table, a.entry, ds)}


def sum_backward(a, _, dy: Tensor) -> dict[str, Tensor]:
    return {"table": spread(a.table, a.entry, dy, a.weight), "weight": products(a.table, a.entry, dy)}


DOT.kernels["c"] = Kernel(lambda a, save: ((products(a.table, a.entry, a.x),), None), dot_backward)
SUM.kernels["c"] = Kernel(lambda a, save: ((sums(a.table, a.entry, a.weight),), None), sum_backward)


def why_not(a) -> str | None:
    if not a.entry.numel() or not a.table.numel():
        return "has nothing to do for empty inputs"
    return why_not_eager(a.table, a[2])


def checked(a):
    low, high = torch.aminmax(a.entry)
    if low < 0 or high >= len(a.table):
        raise IndexError(f"entry names row {int(low if low < 0 else high)} of a table of {len(a.table)} rows")
    return a


def serve(function, kernel) -> None:
    function.register("c", device="cpu", missing=MISSING, unsupported=why_not)(lambda a: kernel(checked(a), "c"))


serve(dot_rows, DOT)
serve(sum_rows, SUM)
