"""What the theory cards predict, measured: products of tokens by S6 and linear attention, and the gap against length.

    python benchmarks/theory.py [--seeds 0 1 2] [--out docs/results]

Separation (arXiv 2502.02209): test error of learning x_1 ... x_r from 6 tokens of +-1 by 1 and 2 layers of width 16.
Bound (arXiv 2502.01473): the majority experiment, 1000 strings, 40 epochs, by length; and the spectral abscissa s_A by
epoch from three starting values. Writes theory.md and theory.png; about 6 minutes on one core.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from ssmzoo.probes import figures
from ssmzoo.probes.majority import train_majority
from ssmzoo.probes.polynomial import separation
from ssmzoo.probes.separation import KINDS, regression

ROOT = Path(__file__).resolve().parent.parent
FACTORS, LAYERS, LENGTHS, STARTS = (2, 3, 4), (1, 2), (25, 50, 100, 200, 400), (-0.1, 0.0, 0.1)


def spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {deviation:{form}}"


def separate(seeds: list[int]) -> tuple[list[str], dict[str, list[float]]]:
    """Lines of the page, and mean errors by curve over FACTORS."""
    curves: dict[str, list[float]] = {}
    lines = ["| layers | " + " | ".join(f"r = {r}" for r in FACTORS) + " |", "|---" * (len(FACTORS) + 1) + "|"]
    for kind in KINDS:
        for m in LAYERS:
            cells = [[regression(kind, r, m, seed=s) for s in seeds] for r in FACTORS]
            curves[f"{kind.replace('_', ' ')}, {m}"] = [statistics.mean(c) for c in cells]
            lines.append(f"| {m} {kind.replace('_', ' ')} | {' | '.join(spread(c, '.3f') for c in cells)} |")
            print(lines[-1], flush=True)
    least = ", ".join(f"{max(separation(r)[1:3])} for r = {r}" for r in FACTORS)
    lines += ["", f"Layers of linear attention needed at least, by degree and by coupled tokens: {least}."]
    return lines, curves


def majority_by_length(seeds: list[int]) -> tuple[list[str], dict[str, list[float]]]:
    lines = [
        "| T | training accuracy (%) | test accuracy (%) | gap in accuracy | test minus training loss (nats) | "
        "rho_A | surrogate G_T / sqrt(m) |",
        "|---|---|---|---|---|---|---|",
    ]
    curves: dict[str, list[float]] = {"accuracy gap": [], "surrogate": []}
    for T in LENGTHS:
        points = [train_majority(T, epochs=40, seed=s) for s in seeds]
        surrogate = [p.surrogate for p in points]
        cells = [
            spread(v, form)
            for v, form in (
                ([p.train for p in points], ".1f"),
                ([p.test for p in points], ".1f"),
                ([p.train - p.test for p in points], ".1f"),
                ([p.gap for p in points], ".2f"),
            )
        ]
        cells += [", ".join(f"{p.rho:.3f}" for p in points), ", ".join(f"{v:.3g}" for v in surrogate)]
        lines.append(f"| {T} | {' | '.join(cells)} |")
        curves["accuracy gap"].append(statistics.mean(p.train - p.test for p in points))
        curves["surrogate"].append(statistics.median(surrogate))
        print(lines[-1], flush=True)
    return lines, curves


def stability(seeds: list[int]) -> tuple[list[str], dict[str, list[float]]]:
    lines, curves = ["| s_A at the start | after 10 epochs, T = 250 |", "|---|---|"], {}
    for start in STARTS:
        paths = []
        for s in seeds:
            try:
                paths.append(train_majority(250, start, epochs=10, seed=s).s_A_path)
            except FloatingPointError as error:
                lines.append(f"| {start} | seed {s}: {error} |")
        if paths:
            lines.append(f"| {start} | {spread([p[-1] for p in paths], '.4f')} |")
            curves[f"start {start}"] = [start, *(statistics.mean(at) for at in zip(*paths))]
        print(lines[-1], flush=True)
    return lines, curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    (first, errors), (second, gaps), (third, paths) = (f(args.seeds) for f in (separate, majority_by_length, stability))
    figure, axes = figures.canvas(1, 3, (4.6, 3.4))
    figures.lines(
        axes[0, 0],
        FACTORS,
        errors,
        "r, tokens in the product",
        "test error (1: nothing learned)",
        "learning products of tokens",
        xticks=FACTORS,
        ylim=(-0.03, 1.3),
    )
    axes[0, 1].plot(LENGTHS, gaps["accuracy gap"], color=figures.COLOURS[0], marker="o", label="measured gap")
    axes[0, 1].set(
        xlabel="length T (symbols)", ylabel="training minus test accuracy (points)", title="majority", xscale="log"
    )
    axes[0, 1].grid(alpha=0.3)
    other = axes[0, 1].twinx()
    other.plot(
        LENGTHS, gaps["surrogate"], color=figures.COLOURS[1], linestyle="--", marker="s", label="surrogate (right)"
    )
    other.set(ylabel="G_T / sqrt(m), median over seeds", yscale="log")
    drawn = [*axes[0, 1].get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes[0, 1].legend(drawn, [d.get_label() for d in drawn], fontsize=7)
    figures.lines(
        axes[0, 2],
        range(len(next(iter(paths.values())))),
        paths,
        "epoch",
        "s_A (per unit of time)",
        "spectral abscissa in training",
    )
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "theory.png", dpi=130)
    seeds = ", ".join(map(str, args.seeds))
    page = [
        "# Expressivity and generalisation, measured",
        "",
        f"`python benchmarks/theory.py`, seeds {seeds}; mean +- standard deviation over them.",
        "",
        "![Measured](theory.png)",
        "",
        "## Products of r tokens",
        "",
        "Error on x_1 ... x_r relative to the target's variance, 600 steps of 64 strings of 6 signs, width 16.",
        "",
        *first,
        "",
        "## Majority: the gap against length",
        "",
        "A free-A layer (d 4, n 4) from s_A = 0, 1000 training strings of which a quarter of the ones is erased,",
        "1000 clean test strings, 40 epochs.",
        "",
        *second,
        "",
        "## Majority: the spectral abscissa in training",
        "",
        *third,
    ]
    (args.out / "theory.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    print(args.out / "theory.md")


if __name__ == "__main__":
    main()
