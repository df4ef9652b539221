"""Does a bound on the generalisation gap grow with the sequence length? Constants of a selective SSM, curves over T.

    s_A     largest entry of A (spectral abscissa), per unit of time
    delta   >= log(1 + exp(p - B_q B_u)) =: delta_min   for every token u, |u| <= B_u, delta = softplus(p + q^T u)
    rho_A   = exp(delta_min s_A) = (1 + exp(p - B_q B_u))^s_A < 1 for s_A < 0; for s_A > 0 with + in place of -
    G_T     = sum_{k<T} rho_A^k: -> 1 / (1 - rho_A), or T at rho_A = 1, or exponential growth

The gap of the theorem scales like constants x G_T / sqrt(samples); its prefactors are not reproduced, so what is
offered is a surrogate, not a certificate. The output bound |y_T| <= G_T delta_max B_B B_C B_u^3 is elementary.
A Mamba layer has A = -exp(A_log) < 0 always.

d width, e channels, n state size, T length.
Source: Honarpisheh et al. 2025 (arXiv 2502.01473); the case s_A > 0 and the output bound are derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.plain import matrix_of
from ssmzoo.probes.tap import Scan


def constants(ssm: nn.Module, embedding: Tensor) -> dict[str, float]:
    """s_A, L_p, B_q, B_B, M_B, B_C, M_C, B_A, B_u (the paper's names) of a FreeASSM and its tokens' table (v d)."""
    W_B, W_C = ssm.W_B, ssm.W_C
    values = {
        "s_A": ssm.A.max(),
        "L_p": ssm.p_delta.norm(),
        "B_q": ssm.q_delta.norm(),
        "B_B": W_B.norm(),
        "M_B": W_B.abs().sum(),
        "B_C": W_C.norm(),
        "M_C": W_C.abs().sum(),
        "B_A": ssm.A.abs().max(),
        "B_u": embedding.norm(dim=-1).max(),
    }
    return {name: float(value.detach()) for name, value in values.items()}


def decay_rate(s_A: float, p: float, B_q: float, B_u: float) -> float:
    """rho_A, the slowest decay (or fastest growth) per token; p is the signed offset of the time step."""
    worst = p - B_q * B_u if s_A < 0 else p + B_q * B_u
    return float(torch.exp(s_A * nn.functional.softplus(torch.tensor(worst, dtype=torch.float64))))


def length_factor(rho: float, T: Tensor) -> Tensor:
    """G_T = (1 - rho^T) / (1 - rho) for lengths T, or T at rho = 1; infinite where it overflows."""
    T = T.double()
    if rho == 1:
        return T
    return torch.expm1(T * torch.log(torch.tensor(rho, dtype=torch.float64))) / (rho - 1)


def output_bound(ssm: nn.Module, embedding: Tensor, T: Tensor) -> Tensor:
    """G_T delta_max B_B B_C B_u^3 for lengths T: no read-out of unit norm exceeds it."""
    c, p = constants(ssm, embedding), ssm.p_delta.item()
    delta = torch.tensor(p + c["B_q"] * c["B_u"], dtype=torch.float64)
    delta = nn.functional.softplus(delta) if ssm.use_delta else torch.ones(())
    rho = decay_rate(c["s_A"], p, c["B_q"], c["B_u"]) if ssm.use_delta else float(torch.tensor(c["s_A"]).exp())
    return length_factor(rho, T) * delta * c["B_B"] * c["B_C"] * c["B_u"] ** 3


class LayerStability(NamedTuple):
    """One scan: s_A | rho: slowest decay per token met on the data, exp(min delta x s_A) | mean of exp(delta A) on it
    | horizon 1 / (1 - rho) in tokens | histogram (bins) of exp(delta A), shares over [0, 1] (beyond: last bin)."""

    name: str
    s_A: float
    rho: float
    mean_decay: float
    horizon: float
    histogram: Tensor


@torch.no_grad()
def stability(scan: Scan, bins: int = 40) -> LayerStability:
    """Decays that a trained layer shows on data, in place of what its norms could allow at worst."""
    abscissa = scan.A.max(-1).values  # (e)
    step = scan.delta.amin((0, 2)) if float(abscissa.max()) < 0 else scan.delta.amax((0, 2))
    rho = float(torch.exp(step * abscissa).max())
    total, mean = torch.zeros(bins, dtype=torch.float64), []
    for i in range(scan.u.shape[1]):  # channel by channel: (b l n) at a time
        decay = torch.exp(scan.delta[:, i, :, None] * scan.A[i])
        mean.append(decay.mean().double())
        total += torch.bincount((decay.clamp(0, 1).flatten() * bins).long().clamp(max=bins - 1).cpu(), minlength=bins)
    horizon = float("inf") if rho >= 1 else 1 / (1 - rho)
    return LayerStability(
        scan.name, float(abscissa.max()), rho, float(torch.stack(mean).mean()), horizon, total / total.sum()
    )


class Worst(NamedTuple):
    """One direction of a layer from its parameters: B_q (largest over channels), B_B, B_C (Frobenius norms of the rows
    of x_proj) | B_u: largest norm of what the scan read on the data | rho: exp(softplus(p - B_q B_u) s_A), the
    slowest decay that these norms allow | limit 1 / (1 - rho) of G_T for any length."""

    name: str
    B_q: float
    B_B: float
    B_C: float
    B_u: float
    rho: float
    limit: float


@torch.no_grad()
def worst_case(scan: Scan, mixer: nn.Module) -> list[Worst]:
    """The paper's constants of every direction of a Mamba layer; [] for mixers without an x_proj in front of the scan.
    scan with all its channels."""
    found, e = [], scan.total // scan.directions
    for k, (x_proj, dt_proj, p) in enumerate(_projections(mixer)):
        r, n = dt_proj.shape[1], scan.A.shape[1]
        if x_proj.shape[0] < r + 2 * n or len(p) != e or len(scan.channels) != scan.total:
            continue
        part = slice(k * e, (k + 1) * e)
        B_u = scan.u[:, part].norm(dim=1).max().double()
        q = (dt_proj.double() @ x_proj[:r].double()).norm(dim=1)  # (e): delta_c = softplus(p_c + q_c^T u)
        step = nn.functional.softplus(p.double() - q * B_u)
        gap = float(-torch.expm1(step * scan.A[part].max(-1).values.double()).max())  # 1 - rho, which may be tiny
        found.append(
            Worst(
                f"{scan.name}{f', direction {k}' if scan.directions > 1 else ''}",
                float(q.max()),
                float(x_proj[-2 * n : -n].norm()),
                float(x_proj[-n:].norm()),
                float(B_u),
                1 - gap,
                1 / max(gap, 1e-300),
            )
        )
    return found


def _projections(mixer: nn.Module):
    """x_proj (r+2n e), dt_proj (e r), dt bias (e) of every direction."""
    if all(hasattr(mixer, name) for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias")):
        weights = (mixer.x_proj_weight, mixer.dt_projs_weight, mixer.dt_projs_bias)
        yield from zip(*weights) if weights[0].ndim == 3 else [weights]
    for suffix in ("", "_b"):
        x_proj, dt_proj = (getattr(mixer, name + suffix, None) for name in ("x_proj", "dt_proj"))
        if isinstance(x_proj, nn.Module) and isinstance(dt_proj, nn.Module):
            yield matrix_of(x_proj), matrix_of(dt_proj), dt_proj.bias


class Gap(NamedTuple):
    """By length T: loss on training and on validation text (nats per token), and the standard error of their
    difference over the sequences."""

    T: list[int]
    train: Tensor
    validation: Tensor
    error: Tensor


@torch.no_grad()
def measured_gap(model: nn.Module, train: Tensor, validation: Tensor, lengths: list[int], sequences: int = 64) -> Gap:
    """Losses of a language model on sequences of every length, cut evenly from two streams of ids (n)."""
    rows = []
    for T in lengths:
        losses = []
        for stream in (train, validation):
            if len(stream) <= T + 1:
                raise ValueError(f"sequences of {T} tokens need a text of more than the {len(stream)} tokens given")
            starts = torch.linspace(0, len(stream) - T - 1, sequences).long()
            ids = stream[starts[:, None] + torch.arange(T + 1)].to(next(model.parameters()).device)
            out = model(ids[:, :-1])
            logits = out.logits if hasattr(out, "logits") else out
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(sequences, T).mean(1).double())
        spread = (sum(v.var() for v in losses) / sequences).sqrt() if sequences > 1 else torch.zeros(())
        rows.append([*(v.mean() for v in losses), spread])
    return Gap(list(lengths), *torch.tensor(rows, dtype=torch.float64).T)


def probe(subject):
    """Slowest decays of every layer, by its norms and on the data, the length factor that a bound would carry, and, for
    language models, the gap measured at every length."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding
    from ssmzoo.probes.tap import tap

    with (
        torch.no_grad(),
        tap(subject.model, subject.layers, subject.channels, rows=2, max_bytes=subject.max_bytes) as scans,
    ):
        subject.model(subject.inputs[:2])
    scans = [s for s in scans if isinstance(s, Scan)]
    found = [stability(s) for s in scans]
    if not found:
        raise ValueError(
            f"{type(subject.model).__name__} has dense transitions, whose bound is the column norm they "
            f"are divided by; the spectral abscissa is for diagonal scans. The probes dsf, "
            f"hidden_attention, memory and relevance apply"
        )
    worst = [w for s in scans for w in worst_case(s, subject.model.get_submodule(s.name))]
    finding = Finding(
        {
            "largest s_A": f"{max(f.s_A for f in found):.4g}",
            "slowest decay rho on the data": f"{max(f.rho for f in found):.6f}",
            "limit of G_T on the data (tokens)": f"{max(f.horizon for f in found):.4g}",
        }
    )
    if worst:
        finding.summary["limit of G_T by the norms of the parameters (tokens)"] = f"{max(w.limit for w in worst):.3g}"
        finding.tables["constants"] = (
            ("layer", "B_q", "B_B", "B_C", "B_u on data", "rho", "limit of G_T"),
            [(w.name, *(f"{v:.5g}" for v in w[1:5]), f"{w.rho:.9f}", f"{w.limit:.5g}") for w in worst],
        )
    finding.summary["meaning"] = "a surrogate, not a certificate: the theorem's prefactors are not reproduced"
    finding.tables["layers"] = (
        ("layer", "s_A", "rho", "mean decay", "horizon (tokens)"),
        [(f.name, f"{f.s_A:.5g}", f"{f.rho:.6f}", f"{f.mean_decay:.5f}", f"{f.horizon:.5g}") for f in found],
    )
    T = torch.logspace(0, 4, 41)
    shown = found[:: max(1, len(found) // 6)][:6]
    curves = {f"{i}: rho {f.rho:.4f}": length_factor(f.rho, T) for i, f in enumerate(shown)}
    texts = subject.text is not None and subject.train_text is not None
    figure, axes = figures.canvas(1, 3 if texts else 2, (4.6, 3.4))
    figures.lines(
        axes[0, 0],
        T.tolist(),
        curves | {"no decay: T": T},
        "length T (tokens)",
        "G_T (tokens)",
        "growth with length",
        xscale="log",
        yscale="log",
    )
    bins = (torch.arange(len(found[0].histogram)) + 0.5) / len(found[0].histogram)
    figures.lines(
        axes[0, 1],
        bins.tolist(),
        {f"{i}: {f.name[-24:]}": f.histogram * 100 for i, f in enumerate(shown)},
        "decay exp(delta A) per token",
        "share (%)",
        "decays on data",
    )
    if texts:
        _gap(finding, axes[0, 2], subject, found)
    finding.figures["bound"] = figure
    return finding


def _gap(finding, axis, subject, found: list[LayerStability]) -> None:
    """The measured gap against length, beside the length factor of the layer that decays most slowly."""
    from ssmzoo.probes import figures

    longest = min(1024, len(subject.text) - 2, len(subject.train_text) - 2)
    lengths = [T for T in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if T <= longest]
    gap = measured_gap(subject.model, subject.train_text, subject.text, lengths)
    factor = length_factor(max(f.rho for f in found), torch.tensor(lengths))
    difference = gap.validation - gap.train
    finding.summary[f"measured gap at {lengths[0]} and {lengths[-1]} tokens (nats per token)"] = ", ".join(
        f"{float(difference[i]):.3f} +- {float(gap.error[i]):.3f}" for i in (0, -1)
    )
    finding.summary[f"G_T there, relative to {lengths[0]} tokens"] = f"1, {float(factor[-1] / factor[0]):.3g}"
    finding.tables["gap"] = (
        ("T (tokens)", "training loss (nats)", "validation loss (nats)", "gap", "standard error", "G_T"),
        [
            (t, *(f"{float(v):.5f}" for v in row))
            for t, *row in zip(lengths, gap.train, gap.validation, difference, gap.error, factor)
        ],
    )
    axis.errorbar(
        lengths,
        difference,
        gap.error,
        color=figures.COLOURS[0],
        marker="o",
        markersize=3,
        capsize=2,
        label="measured gap",
    )
    axis.set(
        xlabel="length T (tokens)",
        ylabel="validation minus training loss (nats)",
        xscale="log",
        title="measured gap beside G_T",
    )
    axis.grid(alpha=0.3)
    other = axis.twinx()
    other.plot(lengths, factor, color=figures.COLOURS[1], linestyle="--", label="G_T (right)")
    other.set(ylabel="G_T (tokens)", yscale="log")
    drawn = [*axis.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axis.legend(drawn, [d.get_label() for d in drawn], fontsize=7, loc="lower right")
