"""Operators side by side with what people use today: medians of interleaved runs, as a table and a picture.

    python benchmarks/ops.py [--only scan] [--repeats 15] [--out benchmarks/results]

Cases come from every benchmarks/ops_*.py: a list CASES of Case. Every case has a process of its own. Each contender is
built once, run once to warm up, and then the contenders alternate, so that a change in the machine's mood meets all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@dataclass(frozen=True)
class Case:
    """One line of comparison.

    contenders  name -> function without arguments that builds the inputs and returns the function to time; the first is
                ours, the others are what it is compared with
    target      how many times faster than the others the first should be
    at_most     instead: how many times slower than the first the others may be
    unit        "ms" for times; "MB" when the functions return megabytes instead of being timed
    size        of a contender by its name, in parameters; times are compared in proportion to it
    """

    name: str
    contenders: dict[str, Callable[[], Callable[[], object]]]
    target: float | None = None
    unit: str = "ms"
    repeats: int | None = None
    at_most: float | None = None
    size: Callable[[str], int] | None = None


def measure(case: Case, repeats: int) -> dict[str, float]:
    """Median per contender, in the case's unit. On one thread CPU time, which other programs do not blur."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    runs = {name: build() for name, build in case.contenders.items()}
    if case.unit != "ms":
        return {name: float(run()) for name, run in runs.items()}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(case.repeats or repeats):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def in_fresh_process(case: Case, repeats: int) -> dict[str, float] | str:
    """`measure` where no earlier case has taught the allocator to keep large blocks; a sentence if it can't be run."""
    code = (
        "import json, sys; sys.path[:0] = {path!r}; import ops; case = next(c for c in ops.load_cases({name!r}) "
        "if c.name == {name!r}); print(json.dumps(ops.measure(case, {repeats})))"
    )
    command = code.format(path=[str(HERE), *filter(None, sys.path)], name=case.name, repeats=repeats)
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    if result.returncode != 0:
        return result.stderr.strip().splitlines()[-1]
    return json.loads(result.stdout.strip().splitlines()[-1])


def load_cases(only: str) -> list[Case]:
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("ops_*.py"))]
    return [case for module in modules for case in module.CASES if only in case.name]


def report(results: list[tuple[Case, dict[str, float]]]) -> str:
    lines = ["| what | contender | median | times ours | wanted |", "|---|---|---|---|---|"]
    for case, values in results:
        sizes = {name: 1 if case.size is None else case.size(name) for name in values}
        (first, ours), digits = next(iter(values.items())), 1 if case.at_most is None else 2
        goal = f"{case.target:g}x" if case.target else f"at most {case.at_most:g}x" if case.at_most else ""
        for i, (name, value) in enumerate(values.items()):
            wanted = goal if i else ""
            label = name if case.size is None else f"{name}, {4 * sizes[name] / 1e6:.2f} MB"
            ratio = value / ours / (sizes[name] / sizes[first])
            lines.append(f"| {case.name} | {label} | {value:.3g} {case.unit} | {ratio:.{digits}f} | {wanted} |")
    return "\n".join(lines)


def draw(results: list[tuple[Case, dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(9, 1.0 + 0.9 * len(results)), squeeze=False)
    for axis, (case, values) in zip(axes[:, 0], results):
        bars = axis.barh(list(values), list(values.values()), color=["#2a6f97", *["#a9a9a9"] * (len(values) - 1)])
        axis.bar_label(bars, [f"{v:.3g} {case.unit}" for v in values.values()], padding=3, fontsize=7)
        axis.set_xscale("log")
        axis.set_xlim(min(values.values()) / 3, max(values.values()) * 3)  # a bar's length is a ratio
        axis.xaxis.set_minor_formatter("")
        axis.set_title(case.name, fontsize=8, loc="left")
        axis.tick_params(labelsize=7)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    cases = load_cases(args.only)
    if not cases:
        raise SystemExit(f"no case has {args.only!r} in its name")
    run(cases, args.repeats, args.out, args.only)


def run(cases: list[Case], repeats: int, out: Path, only: str) -> None:
    """Measure the cases one after the other, print as they end, write table and picture into `out`."""
    results = []
    for case in cases:
        values = in_fresh_process(case, repeats)
        if isinstance(values, str):
            print(f"{case.name}: left out, {values}", flush=True)
            continue
        results.append((case, values))
        print(report(results[-1:]).split("\n", 2)[2], flush=True)
    if not results:
        return
    out.mkdir(parents=True, exist_ok=True)
    stem = f"ops_{only.replace(' ', '_')}" if only else "ops"
    cpu = torch.backends.cpu.get_cpu_capability()
    clock = "CPU time of one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    head = f"torch {torch.__version__}, {clock}, {cpu}\n\n"
    (out / f"{stem}.md").write_text(head + report(results) + "\n")
    draw(results, out / f"{stem}.png")
    print(f"\n{out / stem}.md, .png")


if __name__ == "__main__":
    main()
