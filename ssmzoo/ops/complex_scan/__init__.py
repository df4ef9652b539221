"""A linear recurrence with complex diagonal transitions.

    h_t = a_t h_{t-1} + b_t

The gradient of b is the same recurrence backwards in time, g_t = dh_t + conj(a_{t+1}) g_{t+1}, that of a is
g_t conj(h_{t-1}). Letters: b batch, l length, n state size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.checks import expect
from ssmzoo.ops.dispatch import op
from ssmzoo.ops.library import Differentiable


def check_complex_scan(given) -> None:
    sizes: dict[str, int] = {}
    expect("a", given.a, ("b", "l", "n"), sizes)
    expect("b", given.b, ("b", "l", "n"), sizes)
    expect("initial_state", given.initial_state, ("b", "n"), sizes)
    for name, value in given._asdict().items():
        if value is None:
            continue
        if value.device != given.a.device:
            raise ValueError(f"{name} is on {value.device}, expected {given.a.device}, where the first argument lies")
        if not value.is_complex():
            raise ValueError(f"{name} has dtype {value.dtype}, expected complex64 or complex128")


@op(check=check_complex_scan)
def complex_scan(a: Tensor, b: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """States of the recurrence.

    a, b           (b l n) complex: transitions, usually with |a| <= 1, and inputs
    initial_state  (b n) complex, zeros by default
    returns        (b l n) complex: h_1 ... h_l

    Raises ValueError naming the argument, its shape or dtype and the one expected.
    """
    h = b.new_zeros(b.shape[0], b.shape[2]) if initial_state is None else initial_state
    states = []
    for t in range(a.shape[1]):
        h = a[:, t] * h + b[:, t]
        states.append(h)
    return torch.stack(states, dim=1) if states else b


def composed(a: Tensor, b: Tensor, initial_state: Tensor | None) -> Tensor:
    """The recurrence of torch's functions in log2(l) rounds, each joining two neighbouring stretches of time.

    Only products of a are formed, so that nothing overflows for |a| <= 1.
    """
    step, l = 1, a.shape[1]
    if l == 1 and initial_state is None:  # a has a gradient all the same
        initial_state = torch.zeros_like(b[:, 0])
    while step < l:
        b = torch.cat([b[:, :step], b[:, step:] + a[:, step:] * b[:, :-step]], dim=1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], dim=1)
        step *= 2
    return b if initial_state is None else b + a * initial_state[:, None]


class Inputs(NamedTuple):
    """What kernels take: real and imaginary parts next to each other, (... 2)."""

    a: Tensor
    b: Tensor
    initial_state: Tensor | None


def _composed_of_pairs(given: Inputs) -> Tensor:
    a, b, first = (None if t is None else torch.complex(*t.unbind(-1)) for t in given)
    return torch.view_as_real(composed(a, b, first))


SCAN = Differentiable(
    "complex_scan",
    Inputs,
    ("h",),
    saved="h",
    like=lambda given: (given.b.new_empty(given.b.shape),),
    twice=_composed_of_pairs,
)


def of_pairs(given, backend: str) -> Tensor:
    """complex_scan on the kernel registered under `backend`."""
    pairs = (None if t is None else torch.view_as_real(t.resolve_conj()) for t in given)
    return torch.view_as_complex(SCAN(Inputs(*pairs), backend))
