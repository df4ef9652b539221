"""Why a model can or cannot emulate an automaton: its transitions, their spectra, and where its state wanders.

An automaton is followed for ever when every symbol's transition permutes a set of points, one per automaton state: the
eigenvalues that matter then lie on the unit circle, and non-commutative automata need matrices that do not commute.
Mamba's transitions are diagonal, real and inside (0, 1): they commute and they forget.

    model, manifest = ssmzoo.zoo.load_model("runs/sd_ssm/<name>")
    print(run(model, manifest["config"]["data"], "out").text)
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.data.automata import Automaton
from ssmzoo.layers.plain import matrix_of


class Centres(NamedTuple):
    """points (q d): mean of x over every group (automaton state or class); gap: smallest distance between two of them;
    spread: root mean square distance of x from its centre."""

    points: Tensor
    gap: float
    spread: float


class Drift(NamedTuple):
    """Per recorded step: distance of the logits from the right class's centre over half the smallest gap between
    centres (1: another may be nearer), and whether the answer is right; both means over the strings."""

    steps: np.ndarray
    distance: np.ndarray
    accuracy: np.ndarray


@torch.no_grad()
def diagonal_transitions(model: nn.Module, ids: Tensor, num_symbols: int) -> list[Tensor]:
    """For every symbol the values of exp(dt_t A) of all Mamba layers at its occurrences: real numbers in (0, 1)."""
    found: list[list[Tensor]] = [[] for _ in range(num_symbols)]

    def collect(mixer):
        def hook(module, inputs, output):
            dt = F.linear(output[..., : mixer.dt_rank], matrix_of(mixer.dt_proj), mixer.dt_proj.bias)
            dt = F.softplus(dt.float())  # (b l e)
            for symbol in range(num_symbols):
                mean = dt[ids == symbol].mean(0)  # (e)
                found[symbol].append(torch.exp(mean[:, None] * mixer.A).flatten())

        return hook

    mixers = [m for m in model.modules() if hasattr(m, "x_proj") and hasattr(m, "dt_proj") and hasattr(m, "A_log")]
    if not mixers:
        raise ValueError(f"{type(model).__name__} has no Mamba mixer whose diagonal transitions could be read")
    hooks = [m.x_proj.register_forward_hook(collect(m)) for m in mixers]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(values) for values in found]


def draw(automaton: Automaton, rows: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Strings (b l) and automaton states (b l)."""
    ids, states = automaton.draw(np.random.default_rng(seed), rows, length)
    return torch.from_numpy(ids.copy()), torch.from_numpy(states.copy())


def find_centres(x: Tensor, groups: Tensor, num_groups: int) -> Centres:
    """x (m d), the group of every row (m)."""
    count = torch.bincount(groups, minlength=num_groups)
    points = x.new_zeros(num_groups, x.shape[-1]).index_add(0, groups, x) / count.clamp(min=1)[:, None]
    points[count == 0] = float("nan")
    distance = torch.cdist(points, points)
    distance.fill_diagonal_(float("nan"))
    gap = float(np.nanmin(distance.numpy()))
    spread = float((x - points[groups]).square().sum(-1).mean().sqrt())
    return Centres(points, gap, spread)


def learned_moves(T: Tensor, x: Tensor, centres: Centres) -> Tensor:
    """(symbols q q): how near T c_q + x comes to every centre; a permutation matrix when the model is the automaton.

    Column q holds exp(-(distance / (gap / 2))^2), normalised over the rows.
    """
    images = torch.einsum("sij,qj->sqi", T, centres.points) + x[:, None]  # (s q d)
    distance = torch.cdist(images, centres.points.expand(len(T), -1, -1))  # (s q q')
    return torch.softmax(-(distance / (centres.gap / 2)).square(), dim=-1).transpose(1, 2)


def true_moves(automaton: Automaton) -> Tensor:
    """(symbols q q) with a one at [symbol, next state, state]."""
    q, e = automaton.delta.shape
    moves = torch.zeros(e, q, q)
    for symbol in range(e):
        allowed = np.flatnonzero(automaton.delta[:, symbol] >= 0)
        moves[symbol, automaton.delta[allowed, symbol], allowed] = 1
    return moves


@torch.no_grad()
def drift(
    model: nn.Module,
    automaton: Automaton,
    centres: Centres,
    steps: int = 10_000,
    rows: int = 8,
    chunk: int = 500,
    record: int = 50,
    seed: int = 1,
) -> Drift:
    """Follow the logits along `rows` strings of `steps` symbols with carried state, every `record`-th step."""
    ids, states = draw(automaton, rows, steps, seed)
    state, at, distances, right = None, [], [], []
    output = torch.from_numpy(automaton.output)
    for start in range(0, steps, chunk):
        logits, state, _ = model(ids[:, start : start + chunk], state)
        logits = logits[..., : automaton.num_classes]
        picked = torch.arange(0, logits.shape[1], record)
        wanted = output[states[:, start : start + chunk][:, picked]]  # (b steps), -1 where no string can end
        picked, wanted = picked[wanted.min(0).values >= 0], wanted[:, wanted.min(0).values >= 0]
        distances.append((logits[:, picked] - centres.points[wanted]).norm(dim=-1).mean(0) / (centres.gap / 2))
        right.append((logits[:, picked].argmax(-1) == wanted).double().mean(0))
        at.append(picked + start + 1)
    return Drift(*(torch.cat(v).numpy() for v in (at, distances, right)))


def project(x: Tensor) -> Tensor:
    """(m d) -> (m 2) on the two directions of largest variance."""
    centred = x - x.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return centred @ directions[:2].T


class Summary(NamedTuple):
    """What `summarise` found: text for people, figures already written."""

    text: str
    figures: list[Path]


@torch.no_grad()
def summarise(
    model: nn.Module, automaton: Automaton, out_dir: str | Path, steps: int = 10_000, length: int = 40
) -> Summary:
    """All figures for one model: moves (SD-SSM), spectrum (SD-SSM and Mamba), trajectories and drift (any with a
    state)."""
    from ssmzoo.probes import expressivity_figures as draw_figures

    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model = model.eval().float()
    ids, states = draw(automaton, 256, length)
    logits, state, _ = model(ids)
    x, at = logits[:, 1:, : automaton.num_classes], states[:, 1:]  # what the readout makes of the state
    answers = torch.from_numpy(automaton.output)[at]
    centres = find_centres(x[answers >= 0], answers[answers >= 0], automaton.num_classes)
    lines = [
        f"{type(model).__name__} on {automaton.name} ({automaton.num_states} states, {automaton.num_symbols} symbols)",
        f"spread of the logits within a class over half the gap between classes, lengths 2 to {length}: "
        f"{centres.spread / (centres.gap / 2):.2e}",
    ]
    figures = []
    if hasattr(model, "transitions"):
        T, inputs = model.transitions()
        T, inputs = T[: automaton.num_symbols], inputs[: automaton.num_symbols]
        h, _ = model.block(ids)
        moves = learned_moves(T, inputs, find_centres(h[:, 1:].flatten(0, 1), at.flatten(), automaton.num_states))
        truth = true_moves(automaton)
        agree = (moves.argmax(1) == truth.argmax(1))[truth.sum(1) > 0].double().mean()
        commute = (T[0] @ T[-1] - T[-1] @ T[0]).norm() / (T[0] @ T[-1]).norm()
        lines += [
            f"transitions that lead to the right state: {100 * agree:.1f} %",
            f"|T_0 T_{len(T) - 1} - T_{len(T) - 1} T_0| / |T_0 T_{len(T) - 1}|: {commute:.3f}",
        ]
        figures.append(draw_figures.moves(out_dir / "transitions.png", moves, truth, automaton))
        figures.append(
            draw_figures.spectra(
                out_dir / "spectrum.png",
                [torch.linalg.eigvals(t) for t in T],
                [torch.linalg.eigvals(t) for t in truth],
                automaton,
            )
        )
    elif any(hasattr(m, "x_proj") for m in model.modules()):
        values = diagonal_transitions(model, ids, automaton.num_symbols)
        lines.append(
            f"largest diagonal transition: {max(float(v.max()) for v in values):.4f}; all are real, positive "
            f"and "
            f"diagonal, so they commute"
        )
        figures.append(
            draw_figures.spectra(
                out_dir / "spectrum.png", values, [torch.linalg.eigvals(t) for t in true_moves(automaton)], automaton
            )
        )
    flat = project(x.flatten(0, 1)).unflatten(0, (len(x), -1))
    figures.append(draw_figures.trajectories(out_dir / "trajectories.png", flat, at, automaton))
    if state is not None:
        path = drift(model, automaton, centres, steps)
        wrong = path.steps[path.accuracy < 1]
        lines.append(
            f"recorded steps with a wrong answer up to {steps:,}: {len(wrong)} of {len(path.steps)}"
            + (f", first at {wrong[0]:,}" if len(wrong) else "")
        )
        lines.append(
            f"distance of the logits from the right class's over half the gap at step {path.steps[-1]:,}: "
            f"{path.distance[-1]:.2e}"
        )
        figures.append(draw_figures.drift(out_dir / "drift.png", path, automaton))
    return Summary("\n".join(lines), figures)


def language(data: dict) -> Automaton:
    """The automaton that a run's data configuration names. Raises ValueError for other data than data=formal."""
    from ssmzoo.data.formal import choose_automaton

    if not str(data.get("_target_", "")).startswith("ssmzoo.data.formal.FormalData"):
        raise ValueError(
            f"the model was trained with {data.get('_target_')}, not with data=formal; this probe needs an automaton"
        )
    keys = ("automaton", "regex", "alphabet", "generators")
    return choose_automaton(data.get("language", "cycle_navigation"), *(data.get(k) for k in keys))


def run(model: nn.Module, data: dict, out_dir: str | Path, steps: int = 10_000) -> Summary:
    """Write transitions.png, spectrum.png, trajectories.png, drift.png and expressivity.txt.

    model, data  a trained model and the data configuration of its run: `load_model(path)` gives the model and a
                 manifest whose ["config"]["data"] is the latter
    """
    summary = summarise(model, language(data), out_dir, steps)
    (Path(out_dir) / "expressivity.txt").write_text(summary.text + "\n", encoding="utf-8")
    return summary
