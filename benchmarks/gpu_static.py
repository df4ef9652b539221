"""Compile every GPU kernel in every variant that the dispatcher can choose; no GPU is needed.

    python benchmarks/gpu_static.py [--targets sm_80 ...] [--operators ssd ...] [--typical] [--out FILE]

The variants are told by each operator's triton.py (`ssmzoo/ops/triton/variants.py` says how). Prints, and writes to
FILE (docs/results/gpu_static.md), registers, spills, stack, shared memory, resident warps and the innermost loop's
instructions per element; then, for the usual calls, the time that a card's units would need at least: an estimate.
Exit status 1 where a kernel that is used by default spills registers, asks for more shared memory than the target has,
lets fewer than 256 threads of a multiprocessor run at once, or takes, in a usual call, more instructions per element
than its operator allows.
"""

from __future__ import annotations

import argparse
import importlib
import math
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from gpu_compile import KINDS, TARGETS, Launched, launched  # noqa: E402

from ssmzoo import ops  # noqa: E402

LEAST_THREADS = 256  # of a multiprocessor at once, so that some compute while others wait for memory


class Card(NamedTuple):
    """multiprocessors, GHz (boost), GB/s, dense TFLOP/s of TF32 products; the target whose code it runs"""

    name: str
    target: str
    processors: int
    clock: float
    bandwidth: float
    tensor: float


CARDS = (
    Card("H100 SXM", "sm_90", 132, 1.755, 3350, 494),
    Card("H200", "sm_90", 132, 1.755, 4800, 494),
    Card("RTX 4090 (24 GB)", "sm_80", 128, 2.52, 1008, 82.6),
)
PER_CLOCK = {  # warp instructions that a multiprocessor starts in a clock, by what limits them
    "special": (("exponential", "special"), 0.5),
    "arithmetic": (("all",), 4.0),
    "on-chip memory": (("shared", "shuffle", "global load", "global store", "local"), 1.0),
}


class Row(NamedTuple):
    operator: str
    label: str
    default: bool
    typical: bool
    launch: Launched
    elements: float
    trips: tuple[float, ...]  # of the loops, the outermost first
    most: float

    @property
    def per_element(self) -> dict[str, float]:
        """Instructions of the innermost loop; a thread's instruction counts once."""
        deepest = min(len(self.trips), self.launch.depth)  # less where the compiler has unrolled a loop
        counts = self.launch.counts(deepest, deepest)
        return {kind: n * self.launch.threads / self.elements for kind, n in counts.items()}

    @property
    def objections(self) -> list[str]:
        """Why this kernel is not good enough."""
        k, target, found = self.launch, TARGETS[self.launch.target], []
        if k.spilled:
            found.append(f"spills {k.spilled} {'registers' if k.target.startswith('gfx') else 'bytes'} per thread")
        if k.shared > target.shared:
            found.append(f"wants {k.shared} bytes of shared memory, {target.name} has {target.shared}")
        if (n := k.resident * target.lanes) < LEAST_THREADS:
            found.append(f"{n} threads at once, {LEAST_THREADS} are wanted")
        if self.typical and k.target == "sm_90" and (n := self.per_element["all"]) > self.most:
            found.append(f"{n:.1f} instructions per element, {self.most:g} are allowed")
        return found


def operators() -> list[str]:
    """Those with GPU kernels, of their own or told to run another's."""
    home = Path(ops.__path__[0])
    names = [m.name for m in pkgutil.iter_modules(ops.__path__) if m.ispkg]
    launchers = [name for name in names if (home / name / "triton.py").exists()]
    return [
        name for name in launchers if has_kernels(name) or "def variants" in (home / name / "triton.py").read_text()
    ]


def has_kernels(operator: str) -> bool:
    return (Path(ops.__path__[0]) / operator / "triton_kernels.py").exists()


def launcher(operator: str):
    """The module `<operator>/triton.py`."""
    return importlib.import_module(f"ssmzoo.ops.{operator}.triton")


def compiled(operator: str, target: str, typical: bool = False, once: bool = False) -> Iterator[Row]:
    """A row for every different kernel of the operator's variants; once: in the first form in which it is launched."""
    module, seen, known = launcher(operator), {}, set()
    for variant in module.variants():
        if typical and not variant.typical:
            continue
        for kernel in launched(target, variant.run, known if once else None):
            passes = module.PASSES[kernel.kernel]
            if kernel.key in seen and not (variant.typical or variant.default > seen[kernel.key].default):
                continue
            elements = math.prod(kernel.arguments[name] for name in passes.elements)
            trips = tuple(kernel.arguments[n] if isinstance(n, str) else n for n in passes.trips)
            row = Row(operator, variant.label, variant.default, variant.typical, kernel, elements, trips, passes.most)
            seen[kernel.key] = row
            yield row


def milliseconds(row: Row, card: Card) -> dict[str, float]:
    """What each unit needs for the launch, if nothing else held it up: an estimate from below."""
    k, times = row.launch, dict.fromkeys((*PER_CLOCK, "matrix products", "memory"), 0.0)
    processors = min(card.processors, k.programs)
    deepest = len(row.trips)
    for depth in range(deepest + 1):
        counts = k.counts(depth, deepest)
        warps = k.programs * k.num_warps * math.prod(row.trips[:depth])
        for limit, (kinds, rate) in PER_CLOCK.items():
            times[limit] += warps * sum(counts[kind] for kind in kinds) / (rate * processors * card.clock * 1e6)
        flops = sum(_flops(text) for text, there in k.code if min(there, deepest) == depth)
        times["matrix products"] += warps * flops / (card.tensor * 1e9 * processors / card.processors)
    times["memory"] = k.bytes / (card.bandwidth * 1e6)
    return times


def _flops(instruction: str) -> int:
    """Of one warp: HMMA.1688 is a product of 16 x 8 and 8 x 8, HGMMA.64x32x8 a quarter of 64 x 8 and 8 x 32."""
    name = instruction.split()[0]
    if "HGMMA" in name:
        m, n, k = (int(part) for part in next(p for p in name.split(".") if p.count("x") == 2).split("x"))
        return 2 * m * n * k // 4
    if "HMMA" in name:
        k = {"1684": 4, "1688": 8, "16816": 16, "1684.F32": 4}.get(name.split(".")[1], 8)
        return 2 * 16 * 8 * k
    return 0


def table(rows: list[Row]) -> list[str]:
    head = "operator: kernel | variant | target | warps | registers | spilled | stack | shared | resident warps"
    kinds = [k for k in KINDS if k != "local"]
    lines = [f"| {head} | {' | '.join(kinds)} | all | |", f"|{'---|' * (head.count('|') + len(kinds) + 3)}"]
    for row in rows:
        k, counts = row.launch, row.per_element
        cells = [
            f"{row.operator}: {k.kernel}",
            row.label,
            k.target,
            k.num_warps,
            k.registers,
            k.spilled,
            k.stack,
            k.shared,
        ]
        cells += [k.resident, *(f"{counts.get(kind, 0):.3g}" for kind in (*kinds, "all"))]
        if row.objections:
            cells.append("; ".join(row.objections) + ("" if row.default else " (on demand only)"))
        else:
            cells.append("ok")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def estimates(rows: list[Row]) -> list[str]:
    limits = (*PER_CLOCK, "matrix products", "memory")
    lines = [f"| card | operator: kernel | call | programs | {' | '.join(limits)} | at least |", f"|{'---|' * 10}"]
    for card in CARDS:
        for row in rows:
            if row.typical and row.launch.target == card.target:
                k, times = row.launch, milliseconds(row, card)
                most = max(times, key=times.get)
                cells = [card.name, f"{row.operator}: {k.kernel}", row.label, k.programs]
                cells += [f"{t:.3f}" for t in times.values()] + [f"{times[most]:.3f} ({most})"]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


PAGE = """# GPU kernels, compiled without a GPU

Every Triton kernel in {what}, compiled by Triton {triton} for {targets}
(`python benchmarks/gpu_static.py {option}--out docs/results/gpu_static.md`).

{count} kernels, {bad} of them used by default and beyond a limit (registers spilled, more shared memory than a block
may have, fewer than {threads} threads of a multiprocessor at once, more instructions per element than allowed).
Targets are {cards}. Spilled and stack are bytes per thread (registers on AMD), shared is bytes per block. The columns
from {first} on count the instructions of the innermost loop per element; a packed multiply-add counts twice.

## Time by limits: an estimate

Nothing here was measured. Milliseconds that each unit of a card needs for all instructions of a launch, from the
compiled code and the numbers of passes through its loops, if nothing else held it up: {rates} warp instructions per
multiprocessor and clock at boost clock; memory is every tensor once at the full bandwidth. The largest bounds the time
from below; latencies and few resident warps come on top. The RTX 4090 runs the code of sm_80.

{estimates}

## Resources

{table}
"""


def page(rows: list[Row], before: str = "", typical: bool = False) -> str:
    """The page of these rows and of those of `before`, an earlier page, that are of other operators or targets."""
    import triton

    done = {(row.operator, row.launch.target) for row in rows}
    target_of = {card.name: card.target for card in CARDS}
    resources, times = table(rows), estimates(rows)
    for line in before.splitlines():
        first, second, third, *rest = (
            [cell.strip() for cell in line.strip("|").split("|")] if line[:2] == "| " else [""] * 3
        )
        if third in TARGETS and (first.partition(":")[0], third) not in done:
            resources.append(line)
        if first in target_of and (second.partition(":")[0], target_of[first]) not in done:
            times.append(line)
    for lines in (resources, times):
        lines[2:] = sorted(dict.fromkeys(lines[2:]), key=_place)  # a form that differs in nothing is told once
    found = [name for name in TARGETS if any(f" | {name} | " in line for line in resources[2:])]
    return PAGE.format(
        what="the usual calls" if typical else "every variant that the dispatcher can choose",
        option="--typical " if typical else "",
        triton=triton.__version__,
        targets=", ".join(found),
        cards=", ".join(f"{name} ({TARGETS[name].card})" for name in found),
        count=len(resources) - 2,
        bad=sum(not line.endswith(("| ok |", "(on demand only) |")) for line in resources[2:]),
        threads=LEAST_THREADS,
        first=KINDS[0],
        rates=", ".join(f"{name} {rate:g}" for name, (_, rate) in PER_CLOCK.items()),
        estimates="\n".join(times),
        table="\n".join(resources),
    )


def _place(line: str) -> tuple:
    """Operators by name, then targets or cards in their order; within them the order that there was."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    cards, targets = [card.name for card in CARDS], list(TARGETS)
    if cells[0] in cards:
        return cards.index(cells[0]), cells[1].partition(":")[0]
    return cells[0].partition(":")[0], targets.index(cells[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--operators", nargs="+", choices=operators(), default=operators())
    parser.add_argument("--typical", action="store_true", help="usual calls only")
    parser.add_argument("--out", type=Path, help="write the page here; rows of other targets and operators stay")
    args = parser.parse_args()
    rows = []
    for operator in args.operators:
        for target in args.targets:
            new = list(compiled(operator, target, args.typical))
            print("\n".join(table(new)[2 if rows else 0 :]), flush=True)
            rows += new
    print("\n" + "\n".join(estimates(rows)))
    if args.out:
        args.out.write_text(page(rows, args.out.read_text() if args.out.exists() else "", args.typical))
    wrong = [row for row in rows if row.objections and row.default]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} kernels are beyond their limits, see above")


if __name__ == "__main__":
    main()
