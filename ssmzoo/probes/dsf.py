"""The dynamical-systems view of a model: state size, decays and mixing of all its mixers in one language.

The framework is in recurrence.py; the dictionary holds it to every mixer that it names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.probes.dsf_layers import QLSTM, S6, LinearAttention, NormalizedAttention, ScalarS6, SoftmaxAttention
from ssmzoo.probes.recurrence import (
    Recurrence,
    normaliser_as_decay,
    of_attention,
    of_qlstm,
    of_scan,
    reversed_sigmoid_error,
    softmax_features,
    ssd_gates,
)
from ssmzoo.probes.tap import DenseScan, tap

__all__ = [
    "Entry",
    "Recurrence",
    "dictionary",
    "normaliser_as_decay",
    "of_attention",
    "of_qlstm",
    "of_scan",
    "probe",
    "reversed_sigmoid_error",
    "softmax_features",
    "ssd_gates",
]


class Entry(NamedTuple):
    """One row of the dictionary: Lam in words, numbers carried in a layer of width d and state or key size n, and how
    exactly the recurrence and its matrix give the layer's output back, |difference| / |output|."""

    model: str
    Lam: str
    carried: str
    recurrence: float
    matrix: float


@torch.no_grad()
def dictionary(d: int = 16, n: int = 8, l: int = 24, seed: int = 0) -> list[Entry]:
    """Every model of the framework as a layer with random weights in float64, against its recurrence."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, l, d, generator=generator, dtype=torch.float64)
    rows = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {
            "linear attention": ("I, normaliser outside", LinearAttention(d, n)),
            "normalised attention": ("I; eta_{i-1} / eta_i inside", NormalizedAttention(d, n)),
            "S6 (Mamba)": ("diagonal, exp(delta A), per channel", S6(d, n)),
            "SSD (Mamba-2)": ("scalar exp(delta a)", ScalarS6(d, n)),
            "quasi-LSTM": ("diagonal sigma(f)", QLSTM(d)),
            "quasi-LSTM, reversed": ("diagonal sigma(-f)^a", QLSTM(d, reversed=True)),
        }
        softmax = SoftmaxAttention(d, n).double()
    for name, (Lam, layer) in layers.items():
        layer = layer.double()
        if isinstance(layer, S6):
            with tap(layer) as scans:
                y = layer(x)
            r = of_scan(scans[0])
            outputs = [layer.out_proj(t) for t in (r.output(), (r.phi() @ r.value.mT[..., None])[..., 0].mT)]
        elif isinstance(layer, QLSTM):
            r, y, gate = of_qlstm(layer, x), layer(x), layer.input(x).chunk(2, -1)[0]
            o = F.gelu(gate) * torch.sigmoid(layer.gates(r.value).chunk(3, -1)[2])
            outputs = [layer.output(o * t) for t in (r.output(), (r.phi() @ r.value.mT[..., None])[..., 0].mT)]
        else:
            r, y = of_attention(layer, x), layer(x)
            outputs = [layer.out_proj(t) for t in (r.output(), (r.phi() @ r.value.mT[..., None])[..., 0].mT)]
        errors = [float((t - y).norm() / y.norm()) for t in outputs]
        rows.append(Entry(name, Lam, f"{r.state_size:,}", *errors))
    matrix = float((softmax.out_proj(softmax.mixing_matrix(x)[:, 0] @ softmax.Wv(x)) - softmax(x)).norm())
    rows.append(
        Entry(
            "softmax attention",
            "I, infinitely many features",
            "infinite (or a cache that grows with i)",
            float("nan"),
            matrix / float(softmax(x).norm()),
        )
    )
    return rows


def probe(subject):
    """State sizes, decays, horizons and mixing matrices of every scan of a model, in the framework's terms."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    with torch.no_grad(), tap(subject.model, subject.layers, rows=1, max_bytes=subject.max_bytes) as scans:
        subject.model(subject.inputs[:1])
    finding, rows, distance, decays = Finding(), [], {}, {}
    for number, scan in enumerate(scans):
        key = f"{number}: {scan.name}"
        if isinstance(scan, DenseScan):
            values = torch.linalg.eigvals(scan.transitions[0, :16]).abs().flatten()
            rows.append((key, "dense", scan.states.shape[-1], *_quantiles(values), "", ""))
            decays[key] = values
            continue
        picked = list(subject.channels or range(0, len(scan.channels), max(1, len(scan.channels) // 16)))
        r = of_scan(scan.take(picked))
        y = r.output()
        exact = float((torch.einsum("bcij,bjc->bic", r.phi(), r.value) - y).norm() / y.norm().clamp(min=1e-30))
        distance[key], decays[key] = r.by_distance(), r.lam.flatten()
        rows.append(
            (
                key,
                "diagonal",
                scan.total * scan.A.shape[1] // scan.ranks,
                *_quantiles(r.lam),
                f"{float(r.effective_rank().mean()):.2f}",
                f"{exact:.1e}",
            )
        )
    columns = (
        "layer",
        "Lam",
        "numbers carried",
        "|lam| 10 %",
        "median",
        "90 %",
        "effective rank of Phi",
        "|Phi u - y| / |y|",
    )
    finding.tables["layers"] = (columns, rows)
    finding.summary = {
        "numbers carried from token to token": f"{sum(r[2] for r in rows):,}",
        "layers": ", ".join(f"{r[0]} ({r[1]}, {r[2]:,})" for r in rows[:8]),
    }
    finding.tables["dictionary"] = (
        (
            "model (width 16, n 8)",
            "Lam",
            "numbers carried",
            "|recurrence - layer| / |layer|",
            "|Phi v - layer| / |layer|",
        ),
        [
            (e.model, e.Lam, e.carried, *("" if v != v else f"{v:.1e}" for v in (e.recurrence, e.matrix)))
            for e in dictionary()
        ],
    )
    finding.summary["worst of the dictionary's equivalences"] = f"{max(e.matrix for e in dictionary()):.1e}"
    f = torch.linspace(-8, 8, 101, dtype=torch.float64)
    error = reversed_sigmoid_error(f, torch.tensor(1.7, dtype=torch.float64))
    finding.summary["|sigma(-f)^a - exp(-a softplus f)|"] = f"{error:.1e}"
    figure, axes = figures.canvas(1, 2, (4.6, 3.4))
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    shown = list(decays)[:: max(1, len(decays) // 7)][:7]
    figures.lines(
        axes[0, 0],
        (100 * share).tolist(),
        {k: decays[k].double()[:100_000].quantile(share) for k in shown},
        "share of state components (%)",
        "|lam| per token",
        "decays",
    )
    if distance:
        length = max(len(v) for v in distance.values())
        curves = {k: F.pad(distance[k], (0, length - len(distance[k])), value=float("nan")) for k in shown}
        figures.lines(
            axes[0, 1],
            range(length),
            curves,
            "distance (tokens)",
            "mean |Phi[i, i - distance]|",
            "mixing",
            yscale="log",
        )
    else:
        axes[0, 1].set_axis_off()
    finding.figures["dsf"] = figure
    return finding


def _quantiles(values: Tensor) -> list[str]:
    values = values.double().flatten()[:: max(1, values.numel() // 100_000)]
    return [f"{float(values.quantile(q)):.4f}" for q in (0.1, 0.5, 0.9)]
