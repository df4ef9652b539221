"""How far back does an input still move the output?

Of a channel: the weights |alpha[i, i - lag]| with which a scan's output reads its past (see hidden_attention);
of a model: the change of its prediction when the vector at a lag is altered. Either way

    memory = the smallest lag within which 90 % of the influence lies, in tokens (0: only the present token).

The first needs scans, the second works for any sequence model.

b batch, l length, e channels, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.probes.attention_matrices import attention_row, dense_map
from ssmzoo.probes.entry import Entry
from ssmzoo.probes.scan import DenseScan, Scan
from ssmzoo.probes.softmax_attention import Attention

SHARE = 0.9


class Influence(NamedTuple):
    """curve (l) influence by lag, its largest value 1 | memory: lag within which SHARE of it lies, in tokens."""

    curve: Tensor
    memory: int


def memory_length(weights: Tensor, share: float = SHARE) -> Tensor:
    """(... lags) non-negative, lag 0 first -> (...) smallest lag within which `share` of the sum lies."""
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; expected a number between 0 and 1, such as 0.9")
    reached = weights.cumsum(-1) >= share * weights.sum(-1, keepdim=True)
    return reached.to(torch.uint8).argmax(-1)


@torch.no_grad()
def channel_memory(scan: Scan | Attention, rows: int = 4, share: float = SHARE, chunk: int = 64) -> Tensor:
    """Memory (e) of every channel, or head, mean over the batch and over `rows` positions in the
    last quarter of the sequence."""
    l = scan.length
    reads = torch.linspace(3 * l // 4, l - 1, max(1, min(rows, l - 3 * l // 4))).long().tolist()
    out = []
    for i in range(0, len(scan.channels), chunk):
        part = scan.take(range(i, min(i + chunk, len(scan.channels))))
        lengths = [memory_length(attention_row(part, r)[..., : r + 1].abs().flip(-1), share).double() for r in reads]
        out.append(torch.stack(lengths).mean((0, 1)))
    return torch.cat(out)


@torch.no_grad()
def dense_memory(scan: DenseScan, rows: int = 4, share: float = SHARE) -> Tensor:
    """The same of a state with dense transitions, (1): by the norms with which it carries its inputs on."""
    carried, l = dense_map(scan), scan.states.shape[1]
    reads = torch.linspace(3 * l // 4, l - 1, max(1, min(rows, l - 3 * l // 4))).long().tolist()
    return torch.stack([memory_length(carried[:, r, : r + 1].flip(-1), share).double() for r in reads]).mean()[None]


def gradient_influence(entry: Entry, probes: int = 8, seed: int = 0) -> Influence:
    """|d <v, log-probabilities at the last position> / d value at every lag|, mean over the batch and over `probes`
    random directions v."""
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | float = 0.0
    with torch.enable_grad():
        leaf = entry.values.detach().requires_grad_()
        logits = entry.logits(leaf).log_softmax(-1)
        for i in range(probes):
            v = torch.randn(logits.shape[-1], generator=generator).to(logits)
            (gradient,) = torch.autograd.grad((logits @ v).sum(), leaf, retain_graph=i + 1 < probes)
            total = total + gradient.norm(dim=-1).mean(0)
    return _influence(total / probes)


@torch.no_grad()
def substitution_influence(entry: Entry, lags: Sequence[int], seed: int = 0) -> Tensor:
    """KL divergence (nats) of the next-token prediction after the vector at every lag is replaced by another token's.

    The replacements are vectors of the same input at random positions. Returns (len(lags))
    """
    b, l = entry.values.shape[:2]
    if lags and not 0 <= min(lags) <= max(lags) < l:
        raise ValueError(f"lags go from 0 to {l - 1} in a sequence of {l} tokens, got {min(lags)} to {max(lags)}")
    generator = torch.Generator().manual_seed(seed)
    before = entry.logits(entry.values).log_softmax(-1)
    change = []
    for lag in lags:
        other = torch.randint(0, l, (b,), generator=generator).to(entry.values.device)
        values = entry.values.clone()
        values[:, l - 1 - lag] = entry.values[torch.arange(b), other]
        after = entry.logits(values).log_softmax(-1)
        change.append((before.exp() * (before - after)).sum(-1).mean())
    return torch.stack(change)


def probe(subject):
    """Memory of every channel of every scan, and of the whole model."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.entry import enter
    from ssmzoo.probes.subject import Finding
    from ssmzoo.probes.tap import tap

    finding, by_layer, scans = Finding(), {}, []
    try:
        with (
            torch.no_grad(),
            tap(
                subject.model,
                subject.layers,
                subject.channels,
                rows=2,
                max_bytes=subject.max_bytes,
                attention=not subject.is_image,  # which looks in all directions
            ) as scans,
        ):
            subject.model(subject.inputs[:2])
    except ValueError as error:
        if "ran no scan" not in str(error):
            raise
    for i, scan in enumerate(scans):
        by_layer[f"{i}: {scan.name}"] = dense_memory(scan) if isinstance(scan, DenseScan) else channel_memory(scan)
    for name, memory in by_layer.items():
        finding.summary[f"{name}, tokens: median, 90 %, largest"] = ", ".join(
            f"{float(v):.1f}" for v in (memory.median(), memory.quantile(0.9), memory.max())
        )
    figure, axes = figures.canvas(1, 2, (4.6, 3.4))
    longest = max(float(m.max()) + 1 for m in (*by_layer.values(), torch.ones(1)))
    longest = longest if subject.is_image else max(longest, subject.inputs.shape[1])
    if by_layer:
        edges = torch.logspace(0, torch.log10(torch.tensor(float(longest))), 21).tolist()
        shares = {n: (m[:, None] + 1 <= torch.tensor(edges)).double().mean(0) * 100 for n, m in by_layer.items()}
        shown = list(shares)[:: max(1, len(shares) // 7)][:7]
        figures.lines(
            axes[0, 0],
            edges,
            {n: shares[n] for n in shown},
            "memory + 1 (tokens)",
            "channels with at most that (%)",
            "memory of channels",
            xscale="log",
        )
        finding.tables["channels"] = (
            ("layer", "channel", "memory (tokens)"),
            [(n, i, f"{float(v):.2f}") for n, m in by_layer.items() for i, v in enumerate(m)],
        )
    else:
        axes[0, 0].set_axis_off()
    if subject.is_image:
        axes[0, 1].set_axis_off()
    else:
        entry = enter(subject.model, subject.inputs)
        influence = gradient_influence(entry)
        l = entry.values.shape[1]
        lags = sorted({int(round(l ** (i / 12))) - 1 for i in range(13)} & set(range(l)))
        change = substitution_influence(entry, lags)
        finding.summary["memory of the model by gradients (90 %, tokens)"] = str(influence.memory)
        finding.summary[f"KL after replacing the token {lags[-1]} back (nats)"] = f"{float(change[-1]):.3g}"
        finding.tables["influence"] = (
            ("lag (tokens)", "gradient (relative)", "substitution (nats)"),
            [(t, f"{float(influence.curve[t]):.4g}", f"{float(c):.4g}") for t, c in zip(lags, change)],
        )
        relative = change / change.max().clamp(min=1e-30)
        curves = {"gradient": influence.curve[lags], "substitution (KL)": relative}
        figures.lines(
            axes[0, 1],
            [t + 1 for t in lags],
            curves,
            "lag + 1 (tokens)",
            "influence, largest = 1",
            "memory of the model",
            xscale="log",
            yscale="log",
        )
    finding.figures["memory"] = figure
    return finding


def _influence(by_position: Tensor) -> Influence:
    curve = by_position.flip(0)
    return Influence(curve / curve.max().clamp(min=1e-30), int(memory_length(curve)))
