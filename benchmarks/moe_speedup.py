"""Steps that Mamba needs to the final loss of MoE-Mamba with the same active parameters, over its own steps.

    python benchmarks/moe_speedup.py [--seeds 0 1 2] [--runs DIR] [overrides of train.py ...]

The definition of the MoE-Mamba paper (arXiv 2401.04081): above 1, the experts save steps. Both models train on the
default corpus at learning rate 4e-3; runs that DIR already holds are not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from ssmzoo.train.logger import read_metrics

ROOT = Path(__file__).resolve().parent.parent


def curve(model: str, seed: int, runs: Path, overrides: list[str]) -> list[tuple[int, float]]:
    """[(optimiser step, validation loss)] of a run, trained now if it is not there."""
    folder = runs / model / f"{'moe' if model == 'moe_mamba' else model}{seed}"
    if not (folder / "report.md").exists():
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"model={model}",
            "optim.lr=4e-3",
            f"seed={seed}",
            f"name={folder.name}",
            f"runs_dir={runs}",
            "trainer.val_check_interval=20",
            "task.sample_tokens=0",
        ]
        subprocess.run([*command, *overrides], check=True, stdout=subprocess.DEVNULL)
    return [(int(r["step"]) + 1, r["val/loss"]) for r in read_metrics(folder / "metrics.csv") if "val/loss" in r]


def steps_to(points: list[tuple[int, float]], loss: float) -> float | None:
    """The step at which a curve first reaches `loss`, by linear interpolation; None when it never does."""
    for (step, value), (next_step, next_value) in zip(points, points[1:]):
        if next_value <= loss < value:
            return step + (next_step - step) * (value - loss) / (value - next_value)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/moe_speedup"))
    args, overrides = parser.parse_known_args()
    ratios = []
    print(f"{'seed':<6}{'Mamba':>10}{'MoE-Mamba':>12}{'steps of Mamba to it':>23}{'ratio':>8}")
    for seed in args.seeds:
        mamba, moe = (curve(model, seed, args.runs, overrides) for model in ("mamba", "moe_mamba"))
        reached = steps_to(mamba, moe[-1][1])
        ratios.append(reached / moe[-1][0] if reached else float("inf"))
        print(f"{seed:<6}{mamba[-1][1]:>10.4f}{moe[-1][1]:>12.4f}{reached or float('inf'):>23.0f}{ratios[-1]:>8.2f}")
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    print(f"steps(Mamba to MoE-Mamba's final loss) / steps(MoE-Mamba) = {statistics.mean(ratios):.2f} +- {spread:.2f}")


if __name__ == "__main__":
    main()
