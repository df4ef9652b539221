"""Token dynamics: do a layer's weights pull tokens to the origin along depth, or push them apart?

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


class Criterion(NamedTuple):
    """One scan's weights judged.

    name, direction   module and scan direction | eigenvalues (n) real parts of the non-zero spectrum, ascending
    positive          share of them above 0 | scenario "convergent", "divergent" or "mixed"
    """

    name: str
    direction: int
    eigenvalues: Tensor
    positive: float
    scenario: str


def io_spectrum(x_proj: Tensor, dt_rank: int) -> Tensor:
    """Real parts (n), ascending, of the eigenvalues of S_C^T S_B that can differ from 0; x_proj (r+2n e)."""
    S_B, S_C = x_proj.detach().double()[dt_rank:].chunk(2)
    return torch.linalg.eigvals(S_B @ S_C.T).real.sort().values


def judge(eigenvalues: Tensor) -> str:
    """The paper's rule: all negative convergent, all positive divergent; between them mixed, which diverges too."""
    if bool((eigenvalues < 0).all()):
        return "convergent"
    return "divergent" if bool((eigenvalues > 0).all()) else "mixed"


def criterion(model: nn.Module) -> list[Criterion]:
    """The criterion for every scan whose B and C come from an x_proj of rows [dt, B, C]; ValueError without any."""
    found = []
    for name, module in model.named_modules():
        for k, (weight, n) in enumerate(_projections(module)):
            values = io_spectrum(weight, weight.shape[0] - 2 * n)
            share = (values > 0).double().mean().item()
            found.append(Criterion(name, k, values, share, judge(values)))
    if not found:
        raise ValueError(f"{type(model).__name__} has no scan with an x_proj, which the criterion is made of; "
                         f"trajectories "
                         f"of token norms work for any model with blocks")
    return found


def _projections(module: nn.Module):
    """(x_proj weight, n) of every direction of a mixer."""
    if hasattr(module, "x_proj_weight") and hasattr(module, "A_logs"):
        weights = module.x_proj_weight
        weights = weights if weights.ndim == 3 else weights[None]
        n = module.A_logs.shape[-1] if module.A_logs.ndim > 1 else 0
        yield from ((w, n) for w in weights if n and w.shape[0] > 2 * n)
    for suffix in ("", "_b"):
        x_proj = getattr(module, f"x_proj{suffix}", None)
        if isinstance(x_proj, nn.Linear) and isinstance(getattr(module, "A_log", None), Tensor):
            yield x_proj.weight, module.A_log.shape[-1]


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


def integrate(x: Tensor, S_C: Tensor, S_B: Tensor, S_dt: Tensor, a: float = 1.0, until: float = 100.0, dt: float = 0.01,
              stop: float = 1e6) -> tuple[Tensor, Tensor]:
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
    """The residual stream (b l d) entering every block with a scan, by depth, from one forward pass."""
    from ssmzoo.probes.explain import Streams
    from ssmzoo.probes.tap import tap

    with torch.no_grad(), Streams(model) as streams, tap(model, rows=0) as scans:
        model(inputs)
    names = [n for n in dict.fromkeys(s.name for s in scans) if streams.of.get(n) is not None]
    if not names:
        raise ValueError(f"{type(model).__name__} has no norm in front of its scans, so no residual stream to follow")
    streams = [streams.of[n] for n in names]
    return names, [s.reshape(len(s), -1, s.shape[-1]) for s in streams]


def probe(subject):
    """Eigenvalue signs of every layer, and token norms and similarities over depth."""
    from ssmzoo.probes import figures
    from ssmzoo.probes.subject import Finding

    found = criterion(subject.model)
    names, path = trajectories(subject.model, subject.inputs)
    norms = [x.norm(dim=-1).double() for x in path]  # (b l) each
    alike = [F.cosine_similarity(x[:, :, None], x[:, None], dim=-1).mean().item() for x in
             ([s[:, :: max(1, s.shape[1] // 64)] for s in path])]
    finding = Finding({"scans": str(len(found))})
    for kind in ("convergent", "mixed", "divergent"):
        finding.summary[f"{kind} scans"] = str(sum(c.scenario == kind for c in found))
    finding.summary["median token norm, first and last block"] = f"{norms[0].median():.4g}, {norms[-1].median():.4g}"
    finding.tables["criterion"] = (("layer", "direction", "scenario", "positive share", "smallest", "largest"), [
        (c.name, c.direction, c.scenario, f"{c.positive:.3f}", f"{c.eigenvalues[0]:.5g}", f"{c.eigenvalues[-1]:.5g}")
        for c in found])
    finding.tables["norms"] = (("block", "5 %", "median", "95 %", "mean cosine between tokens"), [
        (n, *(f"{float(v.quantile(q)):.5g}" for q in (0.05, 0.5, 0.95)), f"{a:.4f}")
        for n, v, a in zip(names, norms, alike)])
    figure, axes = figures.canvas(1, 3, (4, 3.4))
    depth = list(range(len(names)))
    for i, c in enumerate(found):
        sign = c.eigenvalues > 0
        for part, marker, colour in ((sign, "^", figures.COLOURS[0]), (~sign, "v", figures.COLOURS[1])):
            axes[0, 0].scatter([i] * int(part.sum()), c.eigenvalues[part], s=12, marker=marker, color=colour)
    axes[0, 0].scatter([], [], marker="^", color=figures.COLOURS[0], label="positive: diverge")
    axes[0, 0].scatter([], [], marker="v", color=figures.COLOURS[1], label="negative: converge")
    axes[0, 0].axhline(0, color="0.6", linewidth=0.8)
    axes[0, 0].set(xlabel="scan, by depth", ylabel="eigenvalue of S_C^T S_B (real part)", title="criterion")
    axes[0, 0].legend(fontsize=7)
    figures.lines(axes[0, 1], depth, {f"{q} %": [float(v.quantile(q / 100)) for v in norms] for q in (5, 50, 95)},
                  "block", "norm of the residual stream", "token norms over depth")
    figures.lines(axes[0, 2], depth, {"mean over pairs": alike}, "block", "cosine between tokens",
                  "similarity over depth")
    finding.figures["token_dynamics"] = figure
    return finding


# ---- golden cases ---------------------------------------------------------------------------------------------------

NAMES = {"pos": "divergent", "neg": "convergent", "real": "mixed"}


def golden_token_dynamics(case) -> dict[str, Tensor]:
    """The parametrised x_proj with its spectrum, SoftSort, or MambaVision's mixer."""
    from ssmzoo.layers.mamba_vision import MambaVisionMixer
    from ssmzoo.layers.scenario import Scenario
    from ssmzoo.layers.soft_sort import soft_sort

    kwargs = case.official_kwargs
    if "scenario" in kwargs:
        r, n = kwargs["dt_rank"], kwargs["d_state"]
        weight = Scenario(NAMES[kwargs["scenario"]], r, n)(case.params["raw"])
        S_B, S_C = weight.detach()[r:].split(n)
        return {"x_proj_weight": weight, "eigenvalues": torch.linalg.eigvals(S_C.T @ S_B).real.sort().values}
    if "scores" in case.inputs:
        P = soft_sort(case.inputs["scores"], kwargs.get("tau", 1.0), kwargs.get("pow", 1.0), kwargs.get("hard", False))
        return {"P": P}
    kwargs = {k: v for k, v in kwargs.items() if k not in ("use_fast_path", "layer_idx", "conv_bias", "device",
                                                           "dtype")}
    mixer = MambaVisionMixer(**kwargs)
    state = {k.replace("imporantness", "importance"): v for k, v in case.params.items()}
    return {"y": torch.func.functional_call(mixer, state, (case.inputs["x"],))}
