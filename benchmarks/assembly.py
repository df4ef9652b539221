"""Instructions of the kernels' inner loops, per exponential: python benchmarks/assembly.py [forward_states ...]

Disassembles the compiled kernels (objdump of the GNU binutils must be there) and prints, for every innermost loop
of the functions named (default: the selective scan's) that holds exponentials of `v_exp2_of`, --least or more, how many
instructions of each kind stand for one of them. x86 only.
"""

from __future__ import annotations

import argparse
import collections
import re
import shutil
import subprocess

from ssmzoo.ops.native import __path__ as native

KINDS = {  # what the instruction needs, by its name; the first that fits
    "multiply": r"v?f?n?m(add|sub)\d|vmulps|mulps|vscalef|vfn?m(add|sub)",
    "add": r"v?(add|sub|max|min)ps|vcvt|vround|vrndscale|vreduce",
    "store": r"store",
    "load, move": r"v?mov|vbroadcast",
    "integer, shuffle": r"v|p",
}
FUNCTIONS = ("forward_states", "backward_chunk")
FUNCTIONS += (
    "cross_states",
    "cross_backward_chunk",
    "cross_forward_task",
    "cross_backward_task",
)  # as they are inlined


def functions(library: str) -> dict[str, list[tuple[int, str, str]]]:
    """Name, without what compilers append, -> its instructions: (address, name, operands)."""
    command = ["objdump", "-d", "--no-show-raw-insn", library]
    found: dict[str, list[tuple[int, str, str]]] = {}
    code: list[tuple[int, str, str]] = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if name := re.match(r"[0-9a-f]+ <(.+)>:", line):
            code = found.setdefault(name[1].partition(".")[0], [])
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*([^#]*)", line):
            code.append((int(instruction[1], 16), instruction[2], instruction[3].strip()))
    return found


def inner_loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """What stands between a backward jump and its target, where no other such pair lies within."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    loops = []
    for i, (_, name, operands) in enumerate(code):
        if name.startswith("j") and (target := re.match(r"[0-9a-f]+", operands)):
            start = at.get(int(target[0], 16), i)
            if start < i:
                loops.append((start, i))
    within = [(s, e) for s, e in loops if not any(s <= a and b <= e and (a, b) != (s, e) for a, b in loops)]
    return [code[s : e + 1] for s, e in within]


def kind(name: str, operands: str) -> str:
    if re.match(r"v?mov", name) and operands.endswith(")"):
        name = "store"
    return next((k for k, pattern in KINDS.items() if re.match(pattern, name)), "loop")


def exponentials(loop: list[tuple[int, str, str]]) -> int:
    """A table look-up on AVX2, a scaling on AVX-512."""
    return sum(name in ("vpermd", "vpermps", "vscalefps") for _, name, _ in loop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", default=FUNCTIONS)
    parser.add_argument(
        "--least", type=int, default=4, help="exponentials in a loop, at least (default 4: no remainders)"
    )
    arguments = parser.parse_args()
    if shutil.which("objdump") is None:
        parser.error("there is no objdump here; it comes with the GNU binutils")
    print(f"| kernels | function | exponentials in the loop | {' | '.join(KINDS)} | loop | all |\n{'|---' * 10}|")
    for level in ("avx512", "avx2"):
        found = functions(f"{next(iter(native))}/_kernels.{level}.so")
        for name in arguments.functions:
            rows = set()
            for loop in inner_loops(found.get(name, [])):
                number = exponentials(loop)
                counts = collections.Counter(kind(n, operands) for _, n, operands in loop)
                if (
                    number >= max(1, arguments.least) and counts["multiply"] > number
                ):  # fewer: shuffles of something else
                    cells = [f"{counts[k] / number:.1f}" for k in (*KINDS, "loop")]
                    rows.add((-number, f"{' | '.join(cells)} | {len(loop) / number:.1f}"))
            for number, cells in sorted(rows):
                print(f"| {level} | {name} | {-number} | {cells} |")


if __name__ == "__main__":
    main()
