"""The end of a run: a table on the terminal, report.md, report.html and curves.png in the run folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from ssmzoo.terminal import caption
from ssmzoo.train.logger import read_metrics
from ssmzoo.train.page import write_run_page

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito: safe for the colour-blind
STYLES = ("-", "--", ":", "-.")


def table(rows: dict[str, str]) -> str:
    """Aligned 'name  value' lines."""
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def show(rows: dict[str, str], texts: dict[str, str]) -> None:
    """The report on the terminal."""
    print(table(rows))
    for name, body in texts.items():
        print(f"\n{name}\n{body}")


def backends_line() -> str:
    """Which backends serve the operators here, and a warning where compiled kernels could be had and are not."""
    from ssmzoo.ops import BACKENDS, backend_table
    from ssmzoo.ops.dispatch import wanted_backend

    if wanted_backend() is not None:
        return f"operators: all by {wanted_backend()}, as SSMZOO_BACKEND asks"
    rows = backend_table()
    serving: dict[str, str] = {}
    for row in rows:
        if row.available:
            serving.setdefault(row.operator, row.backend)
    counts = {name: list(serving.values()).count(name) for name in BACKENDS}
    line = f"operators: {', '.join(f'{count} by {name}' for name, count in counts.items() if count)}"
    reasons = [row.reason for row in rows if row.backend == "c" and not row.available]
    lacking = next((r for r in reasons if not r.startswith(("no c kernel", "switched off"))), None)
    if lacking is None:
        return f"{line} (`ssmzoo backends` says why)"
    return f"{line}\nwarning: steps take several times longer than with the compiled kernels: {lacking}"


def write_interrupted(run_dir: Path, status: str) -> None:
    """Curves and a report of what a run got done that did not come to its end; what cannot be written is left out."""
    from ssmzoo.checkpoint_files import read_index

    try:
        rows = read_metrics(run_dir / "metrics.csv")
        index = read_index(run_dir / "checkpoints") or {}
        monitor = str(index.get("monitor", "val/loss")).removeprefix("val/")
        figures = draw_curves(run_dir / "metrics.csv", run_dir / "curves.png", monitor, run_dir.name)
        losses = [r["train/loss"] for r in rows if "train/loss" in r]
        best = index["best"][0] if index.get("best") else None
        found = {
            "status": status,
            "steps": f"{int(rows[-1]['step']):,}" if rows else "0",
            "training loss": f"{losses[-1]:.4g} (last)" if losses else "-",
            f"best val/{monitor}": f"{best['value']:.4g} ({best['name']})" if best else "-",
        }
        pictures = [figures] if figures else []
        write_report(run_dir, f"{run_dir.parent.name}: {run_dir.name}", typed(), found, {}, pictures)
    except (OSError, ValueError, KeyError) as error:
        print(f"warning: no report of the run so far ({error})", flush=True)


def typed() -> str:
    """The command that runs, as one types it wherever the checkout lies: `python train.py ...`, `ssmzoo train ...`."""
    program = Path(sys.argv[0]).name
    return shlex.join([*(["python", program] if program.endswith(".py") else program.split()), *sys.argv[1:]])


def draw_curves(metrics_csv: Path, png: Path, monitor: str, title: str) -> Path | None:
    """Training loss (light: every logged step, dark: running mean) and the validation curve against updates.

    A metric of another unit than the loss has axes of its own below.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(metrics_csv)
    train = [(r["step"], r["train/loss"]) for r in rows if "train/loss" in r]
    validation = [(r["step"], r[f"val/{monitor}"]) for r in rows if f"val/{monitor}" in r]
    if not train and not validation:
        return None
    own_axes = bool(train and validation and monitor != "loss")
    size = (7, 6 if own_axes else 4)
    figure, axes = plt.subplots(1 + own_axes, figsize=size, sharex=True, squeeze=False, constrained_layout=True)
    upper, lower = axes[0, 0], axes[-1, 0]
    if train:
        steps, values = zip(*train)
        upper.plot(steps, values, color=COLOURS[0], alpha=0.25, linewidth=1)
        smooth, weight = [], min(0.95, max(0.0, 1 - 25 / len(values)))
        for value in values:
            smooth.append(value if not smooth else weight * smooth[-1] + (1 - weight) * value)
        upper.plot(steps, smooth, color=COLOURS[0], linewidth=2, label="training loss")
    if validation:
        lower.plot(*zip(*validation), color=COLOURS[1], marker="o", linewidth=2, label=f"validation {monitor}")
    upper.set(ylabel="loss" if train else monitor, title=caption(title))
    lower.set(xlabel="optimiser step", ylabel=monitor if validation else "loss")
    for one in {upper, lower}:
        one.grid(alpha=0.3)
        one.legend()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png


def write_report(
    run_dir: Path, title: str, command: str, rows: dict[str, str], texts: dict[str, str], figures: list[Path]
) -> Path:
    """report.md: the command, the table, the texts and the pictures; the same as a page beside it."""
    lines = [f"# {title}", "", f"`{command}`", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    for name, body in texts.items():
        lines += ["", f"## {name}", "", "```", body, "```"]
    lines += ["", *(f"![{f.stem}]({f.relative_to(run_dir).as_posix()})" for f in figures)]
    path = run_dir / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        write_run_page(run_dir)
    except (OSError, ValueError) as error:
        print(f"warning: no report.html ({error})", flush=True)
    return path
