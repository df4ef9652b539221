"""README's picture: how many times as fast as what people use, from the measured table docs/results/ops.md.

python benchmarks/front_figure.py [--table docs/results/ops.md] [--out docs/images/front.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROWS = {  # (case, contender) of the table -> words
    ("training step of mamba, d_model 256, 4 layers, 4 x 256 tokens", "transformers"): "training step of Mamba",
    ("dense_scan evaluation, B 128, L 500", "per-step loop"): "SD-SSM, strings of 500 symbols",
    ("scan forward (1, 1536, 2048, 16)", "mambapy"): "selective scan, 2,048 steps",
    ("scan forward + backward (1, 1536, 512, 16)", "mambapy"): "the scan and its gradient",
    ("decoding 128 tokens, d_model 256, 4 layers, 1 sequence", "transformers generate"): "decoding, one sequence",
}


def read(table: Path) -> tuple[str, dict[tuple[str, str], float]]:
    """(what the machine was, times ours of every contender)."""
    machine, *lines = table.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return machine, {(row[0], row[1]): float(row[3]) for row in cells[1:]}


def draw(table: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    machine, times = read(table)
    labels = [f"{words}\nbeside {key[1]}" for key, words in ROWS.items()]
    values = [times[key] for key in ROWS]
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    bars = axes.barh(labels[::-1], values[::-1], color="#31688e")
    axes.bar_label(bars, [f"{v:.0f}x" if v >= 10 else f"{v:.1f}x" for v in values[::-1]], padding=4)
    axes.set_xscale("log")
    axes.set_xlim(1, 2 * max(values))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel(f"times as fast on a CPU ({machine.split(', torch')[0]})")
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path("docs/results/ops.md"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/front.png"))
    arguments = parser.parse_args()
    draw(arguments.table, arguments.out)


if __name__ == "__main__":
    main()
