"""The mixers of the dynamical-systems view, trained on MQAR: what benchmarks/theory.py says of them.

Two residual layers (norm, mixer) between tied embeddings; learned positions for attention and quasi-LSTM, as in the
paper's blocks. Learning rates are chosen among three on a seed of their own, per mixer and state size.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.data.recall.associative import mqar
from ssmzoo.data.recall.draws import Draws
from ssmzoo.probes.dsf_layers import QLSTM, S6, LinearAttention, NormalizedAttention, ScalarS6, SoftmaxAttention

VOCAB, LENGTH, PAIRS, WIDTH, STEPS, BATCH = 16, 16, 2, 32, 800, 64
RATES, RATE_SEED, SIZES = (1e-3, 3e-3, 1e-2), 100, (4, 16)
MIXERS = {  # name: state size n -> mixer; quasi-LSTM has one number per channel whatever n is
    "softmax attention": lambda n: SoftmaxAttention(WIDTH, n),
    "linear attention": lambda n: LinearAttention(WIDTH, n),
    "normalised attention": lambda n: NormalizedAttention(WIDTH, n),
    "S6": lambda n: S6(WIDTH, n),
    "SSD": lambda n: ScalarS6(WIDTH, n),
    "quasi-LSTM": lambda n: QLSTM(WIDTH),
    "quasi-LSTM, reversed sigmoid": lambda n: QLSTM(WIDTH, reversed=True),
}


class Stack(nn.Module):
    """ids (b l) -> logits (b l v)"""

    def __init__(self, name: str, n: int):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.mixers = nn.ModuleList(MIXERS[name](n) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        nn.init.normal_(self.embed.weight, std=0.02)
        positions = "attention" in name or "LSTM" in name
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH)) if positions else None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.position is not None:
            x = x + self.position[: ids.shape[1]]
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x))
        return self.norms[2](x) @ self.embed.weight.T


def train(name: str, n: int, rate: float, seed: int) -> float:
    """Accuracy (%) over the answers of 512 unseen strings."""
    torch.manual_seed(seed)
    model = Stack(name, n)
    draws = Draws(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def strings(count: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.from_numpy(a).long() for a in mqar(draws, count, LENGTH, PAIRS, VOCAB))

    for _ in range(STEPS):
        ids, labels = strings(BATCH)
        loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    ids, labels = strings(512)
    with torch.no_grad():
        found = model(ids).argmax(-1)
    asked = labels >= 0
    return 100 * float((found == labels)[asked].double().mean())


def one(name: str, n: int, seeds: list[int]) -> tuple[float, list[float]]:
    """(rate, accuracy by seed)"""
    rate = max(RATES, key=lambda r: train(name, n, r, RATE_SEED))
    return rate, [train(name, n, rate, seed) for seed in seeds]


def mixers(seeds: list[int], keep) -> tuple[list[str], list[str]]:
    """Lines of the page, and verdicts. keep(key, make): what make() gave, made once, or None"""
    means: dict[tuple[str, int], tuple[float, float]] = {}
    lines = ["| mixer | " + " | ".join(f"n = {n}, % (learning rate)" for n in SIZES) + " |", "|---" * 3 + "|"]
    for name in MIXERS:
        cells = []
        for n in SIZES if "LSTM" not in name else SIZES[:1]:
            found = keep(f"{name}, n = {n}, {STEPS} steps", lambda: one(name, n, seeds))  # noqa: B023
            if found is None:
                cells.append("not measured yet")
                continue
            rate, values = found
            means[name, n] = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{means[name, n][0]:.1f} +- {means[name, n][1]:.1f} ({rate:g})")
        lines.append(f"| {name} | {cells[0]} | {cells[1] if len(cells) > 1 else 'one number per channel'} |")
        print(lines[-1], flush=True)

    def compare(a: tuple[str, int], b: tuple[str, int], what: str) -> str:
        if a not in means or b not in means:
            return f"- *{what}* is not measured yet."
        (first, s), (second, t) = means[a], means[b]
        told = "holds" if first - second > s + t else "does not hold" if second - first > s + t else "is undecided"
        return f"- *{what}* {told} here ({first:.1f} beside {second:.1f} %)."

    small, large = SIZES
    return lines, [
        compare(("normalised attention", large), ("linear attention", large), "Normalised attention beats linear"),
        compare(("linear attention", large), ("linear attention", small), "Linear attention gains by a larger state"),
        compare(("S6", small), ("linear attention", small), "S6 is ahead of linear attention with small states"),
        compare(
            ("quasi-LSTM, reversed sigmoid", small),
            ("quasi-LSTM", small),
            "The reversed sigmoid helps quasi-LSTM",
        ),
    ]
