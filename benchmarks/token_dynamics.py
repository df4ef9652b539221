"""The two refinements of token dynamics, with and without: scenarios of x_proj on text, sorted tokens on images.

    python benchmarks/token_dynamics.py [--seeds 0 1 2] [--runs DIR] [--limit N] [--out docs/results]

Text: a Mamba of 4 layers and width 64 on the default corpus, 240 steps of 16 x 128 bytes at learning rate 4e-3, with
x_proj free, divergent, mixed or convergent. Images: `mamba_reorder` on digits, 330 steps, with and without reordering.
Runs that DIR already holds are not repeated; --limit trains at most so many and stops, --limit 0 none: the page is then
made of the seeds that all arms of a comparison have. Writes token_dynamics.md and token_dynamics.png.
Claims of the paper (arXiv 2410.03292): convergent has the worst perplexity and divergent the best; reordering raises
accuracy and speeds up convergence.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from ssmzoo.train.logger import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TEXT = [
    "model=mamba",
    "model.d_model=64",
    "model.n_layer=4",
    "data.seq_len=128",
    "data.batch_size=16",
    "optim.lr=4e-3",
    "trainer.max_steps=240",
    "trainer.val_check_interval=40",
    "trainer.limit_val_batches=20",
    "task.sample_tokens=0",
]
IMAGES = ["model=mamba_reorder", "trainer.max_steps=330", "trainer.val_check_interval=33"]
ARMS = {
    "free": TEXT,
    **{s: ["model=mamba_scenario", *TEXT[1:], f"+model.scenario={s}"] for s in ("divergent", "mixed", "convergent")},
    "in order": [*IMAGES, "model.reorder=false"],
    "reordered": [*IMAGES, "model.reorder=true"],
}
METRIC = {arm: "val/top1" if overrides[0] == IMAGES[0] else "val/loss" for arm, overrides in ARMS.items()}


def folder_of(arm: str, seed: int, runs: Path) -> Path:
    model = ARMS[arm][0].partition("=")[2]
    return runs / model / f"{arm.replace(', ', '_').replace(' ', '_')}_{seed}"


def train(arm: str, seed: int, runs: Path) -> None:
    folder = folder_of(arm, seed, runs)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *ARMS[arm],
        f"seed={seed}",
        f"name={folder.name}",
        f"runs_dir={runs}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def curve(arm: str, seed: int, runs: Path) -> list[tuple[int, float]]:
    rows = read_metrics(folder_of(arm, seed, runs) / "metrics.csv")
    return [(int(r["step"]) + 1, r[METRIC[arm]]) for r in rows if METRIC[arm] in r]


def spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} +- {deviation:{form}}"


def page(curves: dict[str, list[list[tuple[int, float]]]], seeds: dict[str, list[int]], command: str) -> str:
    text = [a for a in curves if METRIC[a] == "val/loss"]
    images = [a for a in curves if METRIC[a] == "val/top1"]
    lines = [
        "# Token dynamics: the two refinements, measured",
        "",
        f"`{command}`; mean +- standard deviation over the seeds "
        f"{', '.join(map(str, seeds['val/loss']))} (text) and {', '.join(map(str, seeds['val/top1']))} (digits).",
        "",
        "![Curves](token_dynamics.png)",
        "",
        "## Which scenario x_proj may take (text)",
        "",
        f"`python train.py {' '.join(TEXT)}` and `model=mamba_scenario ... +model.scenario=...`",
        "",
        "| x_proj | validation loss (nats per byte), end | half-way | seeds |",
        "|---|---|---|---|",
    ]
    for arm in text:
        half = [c[len(c) // 2 - 1][1] for c in curves[arm]]
        lines.append(
            f"| {arm} | {spread([c[-1][1] for c in curves[arm]], '.4f')} | {spread(half, '.4f')} | "
            f"{', '.join(f'{c[-1][1]:.4f}' for c in curves[arm])} |"
        )
    means = {a: statistics.mean(c[-1][1] for c in curves[a]) for a in text}
    order = sorted(text, key=means.get)
    claim = [a for a in order if a != "free"]
    lines += [
        "",
        f"Best to worst: {', '.join(order)}. The paper's order (divergent, mixed, convergent) "
        + ("is found." if claim == ["divergent", "mixed", "convergent"] else f"is not found here: {', '.join(claim)}.")
        + f" Convergent minus divergent: {means['convergent'] - means['divergent']:+.4f} nats per byte.",
        "",
        "## Sorting tokens by importance (digits)",
        "",
        f"`python train.py {' '.join(IMAGES)} model.reorder=true|false`",
        "",
        "| tokens | top-1 (%), end | half-way | first validation at 80 % (step) | seeds |",
        "|---|---|---|---|---|",
    ]
    for arm in images:
        half = [100 * c[len(c) // 2 - 1][1] for c in curves[arm]]
        reached = [next((step for step, value in c if value >= 0.8), None) for c in curves[arm]]
        lines.append(
            f"| {arm} | {spread([100 * c[-1][1] for c in curves[arm]], '.1f')} | {spread(half, '.1f')} | "
            f"{', '.join('never' if r is None else str(r) for r in reached)} | "
            f"{', '.join(f'{100 * c[-1][1]:.1f}' for c in curves[arm])} |"
        )
    return "\n".join(lines) + "\n"


def figure(curves: dict[str, list[list[tuple[int, float]]]], file: Path) -> None:
    from ssmzoo.probes import figures

    picture, axes = figures.canvas(1, 2, (5, 3.6))
    for axis, metric, scale, label in (
        (axes[0, 0], "val/loss", 1, "validation loss (nats per byte)"),
        (axes[0, 1], "val/top1", 100, "validation top-1 (%)"),
    ):
        arms = [a for a in curves if METRIC[a] == metric]
        means = {a: [scale * statistics.mean(v[1] for v in at) for at in zip(*curves[a])] for a in arms}
        figures.lines(
            axis,
            [step for step, _ in curves[arms[0]][0]],
            means,
            "optimiser step",
            label,
            "x_proj on text" if metric == "val/loss" else "tokens of digits",
        )
    picture.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/token_dynamics"))
    parser.add_argument("--limit", type=int, help="train at most so many missing runs, then stop")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    missing = [
        (arm, seed)
        for seed in args.seeds
        for arm in ARMS
        if not (folder_of(arm, seed, args.runs) / "report.md").exists()
    ]
    for arm, seed in missing[: args.limit]:
        train(arm, seed, args.runs)
        print(f"{arm}, seed {seed}: {curve(arm, seed, args.runs)[-1][1]:.4f}", flush=True)
    if args.limit and len(missing) > args.limit:
        print(f"{len(missing) - args.limit} runs are missing")
        return
    left = [] if args.limit is None else missing[args.limit :]
    curves, used = {}, {}
    for metric in ("val/loss", "val/top1"):
        arms = [a for a in ARMS if METRIC[a] == metric]
        used[metric] = [s for s in args.seeds if not any((a, s) in left for a in arms)]
        curves |= {a: [curve(a, s, args.runs) for s in used[metric]] for a in arms}
    if not all(used.values()):
        raise SystemExit("no seed has all its runs yet")
    args.out.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/token_dynamics.py"
    (args.out / "token_dynamics.md").write_text(page(curves, used, command), encoding="utf-8")
    figure(curves, args.out / "token_dynamics.png")
    print(args.out / "token_dynamics.md")


if __name__ == "__main__":
    main()
