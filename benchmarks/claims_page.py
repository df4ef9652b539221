"""docs/results/claims.md and a figure per claim, from what benchmarks/claims.py measured."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from claims_list import CLAIMS, SCRIPTS, Claim


def spread(rows: dict[str, dict], key: str = "value") -> tuple[float, float]:
    """(mean, deviation) over seeds."""
    values = [row[key] for row in rows.values()]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def section(claim: Claim, known: dict[str, dict[str, dict]], figure: str | None) -> list[str]:
    lines = [f"## {claim.sentence}", "", f"Published: {claim.published}.", "", f"Here: {claim.data}."]
    lines += [f"`python benchmarks/claims.py --only {claim.name}`", ""]
    more = f" {claim.also[0]} |" if claim.also else ""
    lines += [f"| arm | {claim.unit} |{more} learning rate | seeds | CPU seconds a run |"]
    lines += ["|---" * (6 if more else 5) + "|"]
    for arm in claim.arms:
        rows = known.get(arm.name, {})
        if not rows:
            lines.append(f"| {arm.name} | not tried yet | | | |{' |' if more else ''}")
            continue
        mean, deviation = spread(rows)
        seconds = statistics.mean(row["cpu_seconds"] for row in rows.values())
        rate = ", ".join(f"{v:g}" for v in sorted({row["lr"] for row in rows.values()}))
        beside = " {:.3g} ± {:.2g} |".format(*spread(rows, "also")) if more else ""
        measured = f"| {arm.name} | {mean:.4g} ± {deviation:.2g} |{beside}"
        lines.append(f"{measured} {rate} | {', '.join(sorted(rows))} | {seconds:.0f} |")
    tried = {arm.name: spread(known[arm.name]) for arm in claim.arms if len(known.get(arm.name, {})) > 1}
    try:
        verdict = claim.verdict(tried) if len(tried) > 1 else "not enough arms are tried yet"
        verdict += "" if len(tried) in (len(claim.arms), 0, 1) else "; not all arms are tried yet"
    except KeyError:
        verdict = "not all arms are tried yet"
    lines += ["", f"**{verdict[:1].upper()}{verdict[1:]}.**", ""]
    if claim.timed and all(known.get(name) for name in claim.timed):
        first, second = (statistics.mean(r["cpu_seconds"] for r in known[name].values()) for name in claim.timed)
        lines += [
            f"A run of *{claim.timed[0]}* takes {first / second:.2f} times the CPU seconds of *{claim.timed[1]}*.",
            "",
        ]
    return lines + ([f"![{claim.name}]({figure})", ""] if figure else [])


def draw(claim: Claim, known: dict[str, dict[str, dict]], folder: Path) -> str | None:
    """A dot per seed, a line at the mean; the name of the picture, or None while there is nothing to see."""
    arms = [arm for arm in claim.arms if known.get(arm.name)]
    if len(arms) < 2:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 0.5 * len(arms) + 1.2), layout="constrained")
    for i, arm in enumerate(arms):
        values = [row["value"] for row in known[arm.name].values()]
        axis.plot(values, [i] * len(values), "o", color="#0072B2", alpha=0.6)
        axis.plot([statistics.mean(values)] * 2, [i - 0.3, i + 0.3], color="#D55E00", linewidth=2)
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axis.invert_yaxis()
    axis.set_xlabel(claim.unit)
    axis.grid(axis="x", alpha=0.3)
    path = folder / f"claims_{claim.name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name


def write_page(known: dict, folder: Path) -> Path:
    """The page; `known` is {claim: {arm: {seed: {"value", "cpu_seconds", "lr"}}}}, with "also"
    for claims that tell more."""
    lines = ["# What papers claim, tried in small", ""]
    lines += [
        "Every run has one thread; the learning rate of an arm is the best of three on a seed of its own; mean and",
        "standard deviation are over the seeds named. `python benchmarks/claims.py --budget 60` resumes what is",
        "missing. A claim that does not hold at this size may hold at its own.",
        "",
    ]
    for name, claim in CLAIMS.items():
        found = known.get(name, {})
        lines += section(claim, found, draw(claim, found, folder))
    lines += ["## Claims with pages of their own", "", "| what | page | command |", "|---|---|---|"]
    for script in SCRIPTS.values():
        command = re.sub(r" --budget \{minutes\}", "", " ".join(script.command))
        page = Path(script.page)
        place = page.name if page.parent.name == "results" else f"../{page.name}"
        link = f"[{page.name}]({place})" if (folder / place).exists() else "not written yet"
        lines.append(f"| {script.sentence} | {link} | `python {command}` |")
    path = folder / "claims.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
