"""Cases of benchmarks/ops.py: the dense scan in SD-SSM's training step and evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ops import Case
from torch import nn

from ssmzoo import ops

BATCH, N, K, ALPHABET, P_NORM = 128, 64, 8, 5, 1.2


class SDSSM(nn.Module):
    """One layer and its read-out, with the two ways to run it. Inputs are one-hot (b l alphabet)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.selector, self.B = nn.Linear(ALPHABET, K), nn.Linear(ALPHABET, N, bias=False)
        self.A_dict = nn.Parameter(torch.empty(N, N, K).uniform_(-1, 1) * (3 / N) ** 0.5)
        self.norm, self.readout = nn.LayerNorm(N), nn.Linear(N, ALPHABET)

    def per_step_loop(self, x):
        """The algorithm of the released models/SDSSM.py: mix, normalise and apply (b n n) matrices at every step."""
        h = torch.zeros(len(x), N)
        for t in range(x.shape[1]):
            M = torch.einsum("ijk,bk->bij", self.A_dict, self.selector(x[:, t]).softmax(-1))
            M = M / torch.linalg.vector_norm(M, P_NORM, dim=1, keepdim=True)
            h = torch.einsum("bij,bj->bi", M, h) + self.B(x[:, t])
        return self.readout(self.norm(h))

    def by_symbols(self, x):
        weights = (self.selector.weight.T + self.selector.bias).softmax(-1)
        h, _ = ops.dense_scan(self.A_dict, weights, self.B.weight.T, P_NORM, x.argmax(-1), all_steps=False)
        return self.readout(self.norm(h[:, -1]))


def batch(length):
    rng = torch.Generator().manual_seed(0)
    x = F.one_hot(torch.randint(ALPHABET, (BATCH, length), generator=rng), ALPHABET).float()
    return x, torch.randint(ALPHABET, (BATCH,), generator=rng)


def training_step(way, backend=None):
    def build():
        model, (x, y) = SDSSM(), batch(40)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)

        def step():
            with ops.backend(backend):
                loss = F.cross_entropy(getattr(model, way)(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return step

    return build


def evaluation(way, length, grad):
    def build():
        model, (x, _) = SDSSM(), batch(length)

        def evaluate():
            with torch.set_grad_enabled(grad):
                return getattr(model, way)(x)

        return evaluate

    return build


def sequential(parallel, length=4096):
    """One long sequence in PyTorch, step by step or by products of transitions."""

    def build():
        torch.manual_seed(0)
        A, w, x = torch.randn(N, N, K), torch.rand(1, length, K).softmax(-1), torch.randn(1, length, N)

        def run():
            with torch.no_grad(), ops.backend("torch"):
                return ops.dense_scan(A, w, x, P_NORM, parallel=parallel)

        return run

    return build


CASES = [
    Case(
        f"dense_scan training step, B {BATCH}, L 40, N {N}, K {K}, alphabet {ALPHABET}",
        {
            "ssmzoo": training_step("by_symbols"),
            "ssmzoo torch": training_step("by_symbols", "torch"),
            "per-step loop": training_step("per_step_loop"),
        },
        target=50,
        repeats=5,
        quick=True,
    ),
    Case(
        f"dense_scan evaluation, B {BATCH}, L 500",
        {
            "ssmzoo": evaluation("by_symbols", 500, False),
            "per-step loop": evaluation("per_step_loop", 500, False),
            "per-step loop, gradients on (as released)": evaluation("per_step_loop", 500, True),
        },
        target=100,
        repeats=3,
    ),
    Case(
        "dense_scan in PyTorch, mixtures, B 1, L 4096",
        {"products of transitions": sequential(True), "step by step": sequential(False)},
        repeats=3,
    ),
]
