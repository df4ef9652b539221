"""gated_linear_recurrence of torch's functions: joined stretches of time instead of a loop over the steps."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.ops.gated_linear_recurrence import composed, gated_linear_recurrence


@gated_linear_recurrence.register("torch")
def gated_linear_recurrence_torch(a) -> Tensor:
    return composed(a)
