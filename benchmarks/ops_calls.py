"""Cases of benchmarks/ops.py: what a call costs besides its work, in thousands of calls of next to nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ops import Case

from ssmzoo import ops
from ssmzoo.ops.dispatch import op

CALLS = 1000


@op
def returned(x, weight, bias=None, z=None, act=None, *, state=None):
    """x: an operator with nothing to do, so that a call is its dispatch alone."""
    return x


returned.register("c")(lambda a: a.x)
del ops.dispatch.OPERATORS["returned"]  # no operator of the library


def tensors(*shapes: tuple[int, ...], grad: bool = False) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).requires_grad_(grad) for shape in shapes]


def many(call, *shapes: tuple[int, ...], grad: bool = False):
    """Milliseconds for a thousand calls are microseconds a call."""

    def build():
        given = tensors(*shapes, grad=grad)

        def run():
            for _ in range(CALLS):
                call(*given)

        return run

    return build


def trained(call):
    return lambda *given: torch.autograd.grad(call(*given).sum(), given)


SMALL = (4, 16), (16, 16), (16,)
NORM = (4, 16), (16,)
CASES = [
    Case(
        f"{CALLS} calls of an operator with four tensors and nothing to do",
        {
            "dispatched": many(lambda x, w, b: returned(x, w, b, x, "silu"), *SMALL),
            "called itself": many(lambda x, w, b: returned.reference(x, w, b, x, "silu"), *SMALL),
        },
        quick=True,
    ),
    Case(
        f"{CALLS} calls of linear_act with SiLU, (4, 16) and (16, 16)",
        {
            "ssmzoo": many(lambda x, w, b: ops.linear_act(x, w, b, "silu"), *SMALL),
            "F.silu(F.linear)": many(lambda x, w, b: F.silu(F.linear(x, w, b)), *SMALL),
        },
    ),
    Case(
        f"{CALLS} calls of rms_norm forward + backward, (4, 16)",
        {
            "ssmzoo": many(trained(lambda x, w: ops.rms_norm(x, w)), *NORM, grad=True),
            "F.rms_norm": many(trained(lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)), *NORM, grad=True),
        },
    ),
]
