"""The separation task: products of r tokens, within reach of one simplified S6 layer but not of few linear-attention
layers.

    y = x_1 x_2 ... x_r,  x_i = +-1      linear attention of M layers joins at most (3^M + 1) / 2 tokens in a monomial

so that one layer of it, residual or not, stays at the target's variance for r >= 3, two layers for r >= 6. Both layers
here are the polynomial ones of `polynomial`: no feature map, no normaliser, no gate, no convolution.

b batch, l length, d width, n state size.
Source: Cohen-Karlik et al. 2025 (arXiv 2502.02209) for the layers; this task is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.probes.dsf_layers import S6

KINDS = ("simplified_s6", "s6", "linear_attention")


class PlainLinearAttention(nn.Module):
    """y_i = sum_{j<=i} (q_i^T k_j) v_j, (b l d) -> (b l d): degree 3 at any length."""

    def __init__(self, d: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.q(x) @ self.k(x).mT / x.shape[-1]).tril() @ self.v(x)


class SimplifiedS6(nn.Module):
    """h_i = (1 + Delta_i A) h_{i-1} + Delta_i B_i x_i,  y_i = C_i h_i + D x_i, Delta, B and C linear in x_i."""

    def __init__(self, d: int, n: int):
        super().__init__()
        self.A = nn.Parameter(-torch.rand(d, n) - 0.5)
        self.B, self.C, self.step = nn.Linear(d, n, bias=False), nn.Linear(d, n, bias=False), nn.Linear(d, 1, False)
        self.D = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        B, C, step = self.B(x), self.C(x), self.step(x)  # (b l n), (b l n), (b l 1)
        h, out = torch.zeros_like(self.A).expand(len(x), -1, -1), []
        for t in range(x.shape[1]):
            s = step[:, t, :, None]  # (b 1 1)
            h = (1 + s * self.A) * h + s * x[:, t, :, None] * B[:, t, None]
            out.append((h * C[:, t, None]).sum(-1) + self.D * x[:, t])
        return torch.stack(out, dim=1)


def fit(
    kind: str,
    factors: int,
    layers: int = 1,
    length: int = 6,
    d: int = 16,
    n: int = 8,
    steps: int = 600,
    batch: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    samples: int | None = None,
) -> tuple[float, float]:
    """(training, test) error of learning y = x_1 x_2 ... x_factors (entries +-1, embedded linearly, with learned
    positions): mean squared error over the target's variance, 1 when nothing was learned.

    samples  so many training strings in all; None: fresh ones at every step
    kind  "linear_attention" or "simplified_s6", the polynomial layers, or "s6", the real one; all residual and bare, at
          equal width
    """
    make = {
        "s6": lambda: S6(d, n, dt_rank=d, dt_min=0.05, dt_max=1.0),
        "simplified_s6": lambda: SimplifiedS6(d, n),
        "linear_attention": lambda: PlainLinearAttention(d),
    }
    if kind not in make or not 1 <= factors <= length:
        raise ValueError(
            f"kind is one of {', '.join(make)} (got {kind!r}) and 1 <= factors <= length = {length} (got {factors})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixers = nn.ModuleList(make[kind]() for _ in range(layers))
        embed, head = nn.Linear(1, d), nn.Linear(d, 1)
        position = nn.Parameter(0.5 * torch.randn(length, d))
    generator = torch.Generator().manual_seed(seed)

    def run(x: Tensor) -> Tensor:
        h = embed(x[..., None]) + position
        for mixer in mixers:
            h = h + mixer(h)
        return head(h[:, -1])[:, 0]

    parameters = [position, *(p for m in (mixers, embed, head) for p in m.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)

    def strings(count: int) -> Tensor:
        return torch.randint(0, 2, (count, length), generator=generator) * 2.0 - 1

    known = strings(samples or 2048)
    for _ in range(steps):
        x = known[torch.randint(0, samples, (batch,), generator=generator)] if samples else strings(batch)
        loss = (run(x) - x[:, :factors].prod(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    with torch.no_grad():
        return tuple(float((run(x) - x[:, :factors].prod(1)).square().mean()) for x in (known, strings(2048)))
