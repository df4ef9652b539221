"""What the pages of benchmarks/recall.py are made of: runs by arm, means over seeds, tables and figures."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from recall import chosen_rate
from recall_claims import CLAIMS, SEARCH_SEED, Claim

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class Results:
    """Runs of one claim by arm, at the rate that was chosen; those that chose it are left out."""

    def __init__(self, rows: list[dict], claim: str):
        self.all = [r for r in rows if r["claim"] == claim and "arm" in r]
        known = {r["key"]: r for r in self.all}
        rates = {arm.name: chosen_rate(claim, arm, known) for arm in CLAIMS[claim].arms}
        self.arms: dict[str, list[dict]] = {}
        for row in sorted(self.all, key=lambda r: r["seed"]):
            if row["seed"] != SEARCH_SEED and row["lr"] == rates.get(row["arm"]):
                self.arms.setdefault(row["arm"], []).append(row)

    def __bool__(self) -> bool:
        return bool(self.arms)

    def names(self, claim: Claim) -> list[str]:
        return [arm.name for arm in claim.arms if arm.name in self.arms]

    def over_seeds(self, arm: str, value) -> list[float]:
        return [value(row) for row in self.arms.get(arm, [])]

    def mean(self, arm: str, value) -> float:
        found = self.over_seeds(arm, value)
        return statistics.mean(found) if found else math.nan

    def budget(self, claim: Claim) -> str:
        searched = [r for r in self.all if r["seed"] == SEARCH_SEED]
        steps = sorted({r["steps"] for rows in self.arms.values() for r in rows})
        seeds = sorted({len(rows) for rows in self.arms.values()})
        lacking = [arm.name for arm in claim.arms if arm.name not in self.arms]
        text = (
            f"Budget: {' to '.join(f'{s:,}' for s in sorted({steps[0], steps[-1]}))} steps, "
            f"{'/'.join(map(str, seeds))} "
            f"seed{'s' if seeds != [1] else ''} an arm, {len(searched)} runs to choose learning rates; "
            f"{sum(r['cpu_seconds'] for r in self.all) / 60:.0f} CPU minutes in all."
        )
        return text + (f" Not run: {', '.join(lacking)}." if lacking else "")


def trained(row: dict) -> float:
    """Mean accuracy over the sizes that were trained, in %."""
    return 100 * statistics.mean(row["cases"][case] for case in dict.fromkeys(row["trained"]))


def other(row: dict) -> float:
    """The same, read the other way (twice, or once)."""
    return 100 * statistics.mean(row["other_reading"][case] for case in dict.fromkeys(row["trained"]))


def at(case: str):
    return lambda row: 100 * row["cases"][case]


def spread(values: list[float], digits: int = 1) -> str:
    if not values:
        return ""
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def each(values: list[float]) -> str:
    """The mean and every seed."""
    return spread(values) + (f" ({', '.join(f'{v:.0f}' for v in values)})" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(map(str, r)) + " |" for r in [head, ["---"] * len(head), *rows])


def by_size(case: str) -> tuple[int, ...]:
    return tuple(map(int, case.split("x")))


def figure(png: Path, draw, size=(6.5, 4), **grid) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=size, constrained_layout=True, **grid)
    draw(axes)
    drawn.savefig(png, dpi=120)
    plt.close(drawn)
