"""Token dynamics: do a layer's weights pull tokens to the origin along depth, or push them away from each other?

One S6 layer without skip, gate and convolution, residual, in the limit of many layers (decay a > 0, one channel):

    dx_l/dt = mu x_l sum_{j<=l} exp(-a sum_{k=j+1..l} dt(x_k)) dt(x_j) x_j^2,     mu = S_C^T S_B

The sum is positive: mu < 0 makes every token decay like 1/sqrt(t), mu > 0 makes all of them diverge. In e dimensions
the criterion is the signs of the non-zero eigenvalues of S_C^T S_B, which are those of the n x n matrix S_B S_C^T.

b batch, l tokens, e channels, n state size, r rank of the time step, m layers.
Source: Vo et al. 2025 (arXiv 2410.03292).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.plain import matrix_of


class Criterion(NamedTuple):
    """One scan's weights judged.

    name, direction   module and scan direction (Mamba-2: group) | eigenvalues (n) real parts of the non-zero spectrum,
                      ascending
    positive          share of them above 0 | scenario "convergent", "divergent" or "mixed"
    channels          (e) mu of every channel by itself, S_C[:, c]^T S_B[:, c], the diagonal of S_C^T S_B: a token that
                      lives in channel c alone obeys the one-dimensional equation with it
    """

    name: str
    direction: int
    eigenvalues: Tensor
    positive: float
    scenario: str
    channels: Tensor


def io_spectrum(x_proj: Tensor, dt_rank: int) -> Tensor:
    """Real parts (n), ascending, of the eigenvalues of S_C^T S_B that can differ from 0; x_proj (r+2n e)."""
    return spectrum(*x_proj.detach().double()[dt_rank:].chunk(2))


def spectrum(S_B: Tensor, S_C: Tensor) -> Tensor:
    """(n d) each -> (n)"""
    return torch.linalg.eigvals(S_B @ S_C.T).real.sort().values


def judge(eigenvalues: Tensor) -> str:
    """The paper's rule: all negative convergent, all positive divergent; between them mixed, which diverges too."""
    if bool((eigenvalues < 0).all()):
        return "convergent"
    return "divergent" if bool((eigenvalues > 0).all()) else "mixed"


def criterion(model: nn.Module) -> list[Criterion]:
    """The criterion for every scan whose B and C are linear in what it reads: rows of an x_proj [dt, B, C] in front of
    the scan, or of Mamba-2's in_proj, where it is about the block's input; ValueError without any."""
    found = []
    for name, module in model.named_modules():
        for k, (S_B, S_C) in enumerate(_projections(module)):
            S_B, S_C = S_B.detach().double(), S_C.detach().double()
            values, mu = spectrum(S_B, S_C), (S_C * S_B).sum(0)
            found.append(Criterion(name, k, values, (values > 0).double().mean().item(), judge(values), mu))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no scan with an x_proj (or Mamba-2's in_proj), which the "
            f"criterion is made of; trajectories of token norms work for any model with norms"
        )
    return found


def _projections(module: nn.Module):
    """S_B, S_C (n d) of every direction, or group, of a mixer."""
    if hasattr(module, "x_proj_weight") and hasattr(module, "A_logs"):
        weights = module.x_proj_weight
        weights = weights if weights.ndim == 3 else weights[None]
        n = getattr(module, "d_state", module.A_logs.shape[-1] if module.A_logs.ndim > 1 else 0)
        yield from (w[-2 * n :].split(n) for w in weights if n and w.shape[0] > 2 * n)
    for suffix in ("", "_b"):
        x_proj = getattr(module, f"x_proj{suffix}", None)
        if isinstance(x_proj, nn.Module) and isinstance(getattr(module, "A_log", None), Tensor):
            yield matrix_of(x_proj)[-2 * module.A_log.shape[-1] :].chunk(2)
    if all(hasattr(module, name) for name in ("in_proj", "d_ssm", "ngroups", "d_state", "nheads")):  # Mamba-2's names
        weight = matrix_of(module.in_proj)
        end, gn = weight.shape[0] - module.nheads, module.ngroups * module.d_state  # [..., B, C, dt]
        B, C = weight[end - 2 * gn : end].chunk(2)
        yield from zip(B.split(module.d_state), C.split(module.d_state))


def field(x: Tensor, S_C: Tensor, S_B: Tensor, S_dt: Tensor, a: float | Tensor = 1.0) -> Tensor:
    """dx/dt of tokens x (l d): the simplified S6 layer. S_C, S_B (n d); S_dt (d) one step, or (d d) one per channel."""
    step = F.softplus(x @ S_dt)  # (l) or (l d)
    step = step[:, None].expand_as(x) if step.ndim == 1 else step
    S = step.cumsum(0)  # (l d)
    scores = (x @ S_C.T) @ (x @ S_B.T).T  # (l l)
    decay = torch.exp(-a * _lower(S[:, None] - S[None]))  # (l l d)
    causal = torch.ones(len(x), len(x), dtype=x.dtype).tril()
    return torch.einsum("ij,ijd,jd->id", scores * causal, decay, step * x)


def _lower(x: Tensor) -> Tensor:
    """Entries above the diagonal as 0, so that their exponential stays finite. (l l d)"""
    return x * torch.ones(x.shape[:2], dtype=x.dtype).tril()[..., None]


def integrate(
    x: Tensor,
    S_C: Tensor,
    S_B: Tensor,
    S_dt: Tensor,
    a: float = 1.0,
    until: float = 100.0,
    dt: float = 0.01,
    stop: float = 1e6,
) -> tuple[Tensor, Tensor]:
    """Follow tokens x (l d) in time by steps of Runge-Kutta 4; ends early where a token exceeds `stop`.

    The step is shortened where the field is fast. Returns times (t) and tokens (t l d).
    """
    f: Callable[[Tensor], Tensor] = lambda x: field(x, S_C, S_B, S_dt, a)  # noqa: E731
    times, path, now = [0.0], [x], 0.0
    while now < until and float(x.abs().max()) < stop:
        k1 = f(x)
        h = min(dt, until - now, 0.05 * float(x.norm()) / max(float(k1.norm()), 1e-30))
        h = max(h, 1e-9)
        k2 = f(x + h / 2 * k1)
        k3 = f(x + h / 2 * k2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(x + h * k3))
        now += h
        times.append(now)
        path.append(x)
    return torch.tensor(times, dtype=torch.float64), torch.stack(path)


def trajectories(model: nn.Module, inputs: Tensor) -> tuple[list[str], list[Tensor]]:
    """The residual stream (b l d) entering every block, by depth, from one forward pass: what the last norm in front of
    every scan received, or, in a model without scans, every norm."""
    from ssmzoo.probes.explain import Streams
    from ssmzoo.probes.tap import tap

    scans = []
    with torch.no_grad(), Streams(model) as streams:
        try:
            with tap(model, rows=0) as scans:
                model(inputs)
        except ValueError as error:
            if "ran no scan" not in str(error):
                raise
    names = [n for n in dict.fromkeys(s.name for s in scans) if streams.of.get(n) is not None]
    found = [streams.of[n] for n in names]
    if not scans:
        names, found = list(streams.normed), list(streams.normed.values())
        width = max((x.shape[-1] for x in found if x.ndim == 3), default=0)
        kept = [i for i, x in enumerate(found) if x.ndim == 3 and x.shape[-1] == width]
        names, found = [names[i] for i in kept], [found[i] for i in kept]
    if not names:
        raise ValueError(f"{type(model).__name__} has no norm in front of its scans, so no residual stream to follow")
    return names, [x.reshape(len(x), -1, x.shape[-1]) for x in found]


def growth(path: list[Tensor]) -> Tensor:
    """Norm of every token at the last block over that at the first one, median over the batch, (l); empty where the
    number of tokens changes on the way."""
    if path[0].shape[1] != path[-1].shape[1]:
        return path[0].new_zeros(0)
    return (path[-1].norm(dim=-1) / path[0].norm(dim=-1).clamp(min=1e-12)).median(0).values


def probe(subject):
    """Eigenvalue signs of every layer, mu of every channel, and token norms and similarities over depth."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    names, path = trajectories(subject.model, subject.inputs)
    norms = [x.norm(dim=-1).double() for x in path]  # (b l) each
    alike = [
        F.cosine_similarity(x[:, :, None], x[:, None], dim=-1).mean().item()
        for x in ([s[:, :: max(1, s.shape[1] // 64)] for s in path])
    ]
    grown = growth(path)
    finding = Finding()
    finding.summary["median token norm, first and last block"] = f"{norms[0].median():.4g}, {norms[-1].median():.4g}"
    if len(grown):
        ends = f"{grown[: max(1, len(grown) // 8)].median():.3g}, {grown[-max(1, len(grown) // 8) :].median():.3g}"
        finding.summary["growth of the norm over depth, first and last eighth of the tokens"] = ends
    finding.tables["norms"] = (
        ("block", "5 %", "median", "95 %", "mean cosine between tokens"),
        [
            (n, *(f"{float(v.quantile(q)):.5g}" for q in (0.05, 0.5, 0.95)), f"{a:.4f}")
            for n, v, a in zip(names, norms, alike)
        ],
    )
    try:
        found = criterion(subject.model)
    except ValueError as error:
        found, finding.summary["criterion"] = [], str(error)
    figure, axes = figures.canvas(2, 2, (4.4, 3.4))
    depth = list(range(len(names)))
    if found:
        _criterion(finding, axes[0], found)
    else:
        for axis in axes[0]:
            axis.set_axis_off()
    figures.lines(
        axes[1, 0],
        depth,
        {f"{q} % of the tokens": [float(v.quantile(q / 100)) for v in norms] for q in (5, 50, 95)},
        "block",
        "norm of the residual stream",
        "token norms over depth",
    )
    figures.lines(
        axes[1, 1],
        depth,
        {"mean over pairs of tokens": alike},
        "block",
        "cosine between tokens",
        "similarity over depth",
    )
    finding.figures["token_dynamics"] = figure
    if len(grown):
        finding.figures["growth"] = _growth_figure(grown)
        finding.tables["growth"] = (
            ("token", "last over first norm"),
            [(i, f"{float(v):.5g}") for i, v in enumerate(grown)],
        )
    return finding


def _criterion(finding, axes, found: list[Criterion]) -> None:
    """The criterion by scan and by channel: summary, tables and two panels."""
    from ssmzoo.probes import figures

    for kind in ("convergent", "mixed", "divergent"):
        finding.summary[f"{kind} scans"] = f"{sum(c.scenario == kind for c in found)} of {len(found)}"
    mu = torch.cat([c.channels for c in found])
    finding.summary["channels with mu above 0: divergent by themselves (%)"] = f"{100 * (mu > 0).double().mean():.1f}"
    finding.tables["criterion"] = (
        ("layer", "direction", "scenario", "positive share", "smallest", "largest", "channels with mu > 0 (%)"),
        [
            (
                c.name,
                c.direction,
                c.scenario,
                f"{c.positive:.3f}",
                f"{c.eigenvalues[0]:.5g}",
                f"{c.eigenvalues[-1]:.5g}",
                f"{100 * (c.channels > 0).double().mean():.1f}",
            )
            for c in found
        ],
    )
    finding.tables["channels"] = (
        ("layer", "direction", "channel", "mu", "alone"),
        [
            (c.name, c.direction, i, f"{float(m):.6g}", "divergent" if m > 0 else "convergent")
            for c in found
            for i, m in enumerate(c.channels)
        ],
    )
    for axis, values, label, title in (
        (axes[0], [c.eigenvalues for c in found], "eigenvalue of S_C^T S_B (real part)", "criterion of the scans"),
        (axes[1], [c.channels for c in found], "mu of a channel", "criterion of the channels"),
    ):
        for i, v in enumerate(values):
            sign = v > 0
            for part, marker, colour in ((sign, "^", figures.COLOURS[0]), (~sign, "v", figures.COLOURS[1])):
                axis.scatter([i] * int(part.sum()), v[part], s=10, marker=marker, color=colour)
        axis.scatter([], [], marker="^", color=figures.COLOURS[0], label="positive: diverge")
        axis.scatter([], [], marker="v", color=figures.COLOURS[1], label="negative: converge")
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set(xlabel="scan, by depth", ylabel=label, title=title)
        figures.whole(axis)
        axis.legend(fontsize=7)


def _growth_figure(grown: Tensor):
    from ssmzoo.probes import figures

    figure, axes = figures.canvas(1, 1, (5, 3.2))
    figures.lines(
        axes[0, 0],
        range(len(grown)),
        {"median over the batch": grown},
        "position of the token",
        "norm at the last over the first block",
        "growth over depth by position",
    )
    return figure
