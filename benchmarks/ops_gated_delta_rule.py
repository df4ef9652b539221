"""Cases of benchmarks/ops.py: the gated delta rule with a decay per head and per channel, training and decoding."""

from __future__ import annotations

import torch
from ops import Case
from torch.nn import functional as F

from ssmzoo import ops

N, P = 64, 128  # width of a key, of a value


def inputs(b: int, l: int, h: int, per_channel: bool) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    call = {
        "q": N**-0.5 * F.normalize(torch.randn(b, l, h, N, generator=rng), dim=-1),
        "k": F.normalize(torch.randn(b, l, h, N, generator=rng), dim=-1),
        "v": torch.randn(b, l, h, P, generator=rng),
        "g": -0.1 * torch.rand(b, l, h, *[N] * per_channel, generator=rng),
        "beta": torch.rand(b, l, h, generator=rng),
    }
    return {name: t.requires_grad_() for name, t in call.items()}


def training(backend: str, *sizes):
    def build():
        call = inputs(*sizes)
        weight = torch.randn_like(call["v"])

        def run():
            with ops.backend(backend):
                y, _ = ops.gated_delta_rule(**call)
            torch.autograd.grad(y, list(call.values()), weight)

        return run

    return build


def decoding(backend: str, h: int):
    def build():
        call = {name: t.detach() for name, t in inputs(1, 1, h, False).items()}
        state = torch.zeros(1, h, N, P)

        @torch.no_grad()
        def run():
            with ops.backend(backend):
                ops.gated_delta_rule(**call, initial_state=state)

        return run

    return build


CASES = [
    Case(
        f"gated delta rule forward+backward (b, l, h, n, p) = ({b}, {l}, {h}, {N}, {P}), decay per {unit}",
        {
            "ssmzoo": training("c", b, l, h, unit == "channel"),
            "ssmzoo torch": training("torch", b, l, h, unit == "channel"),
        },
        target=3,
        repeats=5,
    )
    for b, l, h in ((1, 2048, 6),)
    for unit in ("head", "channel")
] + [Case("gated delta rule, one token (b, h) = (1, 6)", {"ssmzoo": decoding("c", 6), "torch": decoding("torch", 6)})]
