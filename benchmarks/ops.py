"""Operators side by side with what people use today: medians of interleaved runs, as a table and a picture.

    python benchmarks/ops.py [--only scan] [--repeats 15] [--seconds 1.5] [--sets avx512,avx2] [--out FOLDER]

Cases come from every benchmarks/ops_*.py: a list CASES of Case. Every case has a process of its own. Each contender is
built once, run once to warm up, and then the contenders alternate, so that a change in the machine's mood meets all. A
case stops after `seconds`; what takes longer than that at once is timed by the one run that was to warm it up.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import machine  # noqa: E402

SECONDS = 1.5  # of measuring, for a case: some forty of them, with three seconds each for their start, in four minutes
LIMIT = 90  # seconds, for a case in all
# Instruction sets of our kernels, and how torch and its libraries are kept to the same one.
SETS = {
    "avx512": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "neon": {},
    "plain": {"ATEN_CPU_CAPABILITY": "default"},
}


LEFT_OUT = "left out, "


class Missing(RuntimeError):
    """A contender that this machine does not have; the message says why. The others are measured."""


@dataclass(frozen=True)
class Case:
    """One line of comparison.

    contenders  name -> function without arguments that builds the inputs and returns the function to time; the first is
                ours, the others are what it is compared with
    target      how many times faster than the others the first should be
    at_most     instead: how many times slower than the first the others may be
    unit        "ms" for times; "MB", "tokens/s" when the functions return that number instead of being timed
    size        of a contender by its name, in parameters; times are compared in proportion to it
    quick       among the few that `ssmzoo bench --quick` runs
    by_name     left out unless asked for by name
    limit       seconds, for the case in all
    """

    name: str
    contenders: dict[str, Callable[[], Callable[[], object]]]
    target: float | None = None
    unit: str = "ms"
    repeats: int | None = None
    at_most: float | None = None
    size: Callable[[str], int] | None = None
    quick: bool = False
    by_name: bool = False
    limit: int = LIMIT


def clock() -> float:
    """Seconds; on one thread CPU time, which other programs do not blur."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def measure(case: Case, repeats: int, seconds: float = SECONDS) -> dict[str, float]:
    """Median per contender, in the case's unit."""
    if case.unit != "ms":
        return dict(filter(None, (_value(case, name, build) for name, build in case.contenders.items())))
    runs = {name: build() for name, build in case.contenders.items()}

    def timed(run) -> float:
        start = clock()
        run()
        return 1e3 * (clock() - start)

    times = {name: [timed(run)] for name, run in runs.items()}
    again = [name for name in runs if times[name][0] < 1e3 * seconds]
    stop = time.perf_counter() + seconds
    for i in range(case.repeats or repeats):
        if i and time.perf_counter() > stop:
            break
        for name in again:
            times[name] = [*(times[name] if i else ()), timed(runs[name])]  # the first one warmed up
    return {name: statistics.median(values) for name, values in times.items()}


def _value(case: Case, name: str, build: Callable) -> tuple[str, float] | None:
    try:
        return name, float(build()())
    except Missing as why:
        print(f"{case.name}: {name} {LEFT_OUT}{why}", file=sys.stderr)
        return None


def in_fresh_process(case: Case, repeats: int, seconds: float = SECONDS, level: str = "") -> dict[str, float] | str:
    """`measure` where no earlier case has taught the allocator to keep large blocks; a sentence if it can't be run.

    level  instruction set, "" for the best
    """
    code = (
        "import json, sys; sys.path[:0] = {path!r}; import ops; case = next(c for c in ops.load_cases({name!r}) "
        "if c.name == {name!r}); print(json.dumps(ops.measure(case, {repeats}, {seconds})))"
    )
    path = [str(HERE), *filter(None, sys.path)]
    command = [sys.executable, "-c", code.format(path=path, name=case.name, repeats=repeats, seconds=seconds)]
    more = {"SSMZOO_NATIVE": level, **SETS[level]} if level else {}
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | more, timeout=case.limit)
    except subprocess.TimeoutExpired:
        return f"it takes longer than {case.limit} s here"
    if result.returncode != 0:
        return (result.stderr.strip() or f"it ended with status {result.returncode}").splitlines()[-1]
    print("\n".join(line for line in result.stderr.splitlines() if LEFT_OUT in line), end="", flush=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def load_cases(only: str) -> list[Case]:
    """Those whose name has `only` in it; without one, all but those that are to be asked for by name."""
    modules = [importlib.import_module(path.stem) for path in sorted(HERE.glob("ops_*.py"))]
    cases = [case for module in modules for case in module.CASES if only in case.name]
    return [case for case in cases if only or not case.by_name]


Values = dict[str, dict[str, float]]  # of a case: instruction set, contender -> median


def report(results: list[tuple[Case, Values]]) -> str:
    """A table; one column of medians and one of ratios for every instruction set."""
    levels = list(dict.fromkeys(level for _, values in results for level in values))
    columns = " | ".join(f"{level + ': ' if level else ''}median | times ours" for level in levels)
    lines = [f"| what | contender | {columns} | wanted |", f"|---|---|{'---|---|' * len(levels)}---|"]
    for case, values in results:
        names = list(dict.fromkeys(name for found in values.values() for name in found))
        sizes = {name: 1 if case.size is None else case.size(name) for name in names}
        digits = 1 if case.at_most is None else 2
        goal = f"{case.target:g}x" if case.target else f"at most {case.at_most:g}x" if case.at_most else ""
        for i, name in enumerate(names):
            cells = [case.name, name if case.size is None else f"{name}, {4 * sizes[name] / 1e6:.2f} MB"]
            for found in (values.get(level, {}) for level in levels):
                if name in found:
                    ratio = found[name] / found[names[0]] / (sizes[name] / sizes[names[0]])
                    cells += [f"{found[name]:.3g} {case.unit}", f"{ratio:.{digits}f}"]
                else:
                    cells += ["", ""]
            lines.append(f"| {' | '.join(cells)} | {goal if i else ''} |")
    return "\n".join(lines)


def draw(results: list[tuple[Case, Values]], path: Path) -> None:
    """Bars, of the first instruction set of each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(results), 1, figsize=(9, 1.0 + 0.9 * len(results)), squeeze=False)
    for axis, (case, found) in zip(axes[:, 0], results):
        values = next(iter(found.values()))
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
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measuring, for each case")
    parser.add_argument("--sets", default="", help=f"a column for each of {','.join(SETS)} named here")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    cases = load_cases(args.only)
    if not cases:
        raise SystemExit(f"no case has {args.only!r} in its name")
    run(cases, args.repeats, args.out, args.only, args.seconds, args.sets.split(","))


def run(
    cases: list[Case],
    repeats: int,
    out: Path,
    only: str,
    seconds: float = SECONDS,
    levels: Sequence[str] = ("",),
) -> None:
    """Measure the cases one after the other, print as they end, write table and picture into `out`."""
    about, others, results, started = _described(), machine.Others(), [], time.perf_counter()
    print(about, flush=True)
    for i, case in enumerate(cases):
        left = (time.perf_counter() - started) / i * (len(cases) - i) if i else len(cases) * (seconds + 3) * len(levels)
        print(f"[{i + 1}/{len(cases)}, some {left:.0f} s left] {case.name}", file=sys.stderr, flush=True)
        values = {level: in_fresh_process(case, repeats, seconds, level) for level in levels}
        for level, sentence in values.items():
            if isinstance(sentence, str):
                print(f"{case.name}{' on ' + level if level else ''}: left out, {sentence}", flush=True)
        values = {level: found for level, found in values.items() if isinstance(found, dict)}
        if values:
            results.append((case, values))
            print(report(results[-1:]).split("\n", 2)[2], flush=True)
    if not results:
        return
    out.mkdir(parents=True, exist_ok=True)
    stem = f"ops_{only.replace(' ', '_')}" if only else "ops"
    clock = "CPU time of one thread" if torch.get_num_threads() == 1 else "time by the clock"
    said = "\n\n".join(filter(None, (f"{about}; {clock}", machine.warning(others.share()))))
    (out / f"{stem}.md").write_text(f"{said}\n\n{report(results)}\n")
    draw(results, out / f"{stem}.png")
    print(f"\n{machine.warning(others.share())}\n{out / stem}.md, .png".lstrip())


def _described() -> str:
    """`machine.describe()` of a process of its own: here no thread may have started before the cases do."""
    path = [str(HERE), *filter(None, sys.path)]
    code = f"import sys; sys.path[:0] = {path!r}; import machine; print(machine.describe())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
