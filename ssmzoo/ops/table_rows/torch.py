"""dot_rows and sum_rows by torch's embedding, which writes the rows out."""

from __future__ import annotations

from ssmzoo.ops.table_rows import dot_rows, dot_torch, sum_rows, sum_torch

dot_rows.register("torch")(dot_torch)
sum_rows.register("torch")(sum_torch)
