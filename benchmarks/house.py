"""How the inside of the package looks, for the checkout at hand and for any commit: what a reader has to walk through.

    python benchmarks/house.py [COMMIT ...]
    python benchmarks/house.py --arrows docs/architecture.md   # draws the imports of rooms there, corrects line numbers

One column for every commit (checked out and compiled in a temporary folder) and one for this checkout:

frames       calls of this package's Python functions in one warm evaluation pass, with files and depth of the stack
foreign      lines of models/ that exist for released checkpoints: key maps, foreign constructors, hooks of tests
circles      groups of files that import each other, imports inside functions counted
operator     files of the selective scan, and lists of five or more of its arguments in order
private      members of torch and Lightning with a leading underscore: used, imported or overridden
arguments    of the longest constructor of a block (layers/, or a part of a model) and of a registered model
named        model files that probes/, layers/ or ops/ import
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "seq_idx")

FRAMES = """
import json, os, sys, torch
import ssmzoo
torch.manual_seed(0)
PACKAGE = os.path.dirname(os.path.abspath(ssmzoo.__file__)) + os.sep
language = ssmzoo.create_model("mamba", vocab_size=256, d_model=64, n_layer=1).eval()
image = ssmzoo.create_model("vmamba", depths=[2, 2], dims=32, num_classes=10, in_chans=3).eval()

def frames(model, x):
    with torch.no_grad():
        for _ in range(3):
            model(x)
        counts, depth, deepest = {}, 0, 0
        def watch(frame, event, argument):
            nonlocal depth, deepest
            if event in ("call", "return") and frame.f_code.co_filename.startswith(PACKAGE):
                depth += 1 if event == "call" else -1
                deepest = max(deepest, depth)
                if event == "call":
                    counts[frame.f_code.co_filename] = counts.get(frame.f_code.co_filename, 0) + 1
        sys.setprofile(watch)
        model(x)
        sys.setprofile(None)
    return [sum(counts.values()), len(counts), deepest]

print(json.dumps([frames(language, torch.zeros(1, 16, dtype=torch.long)), frames(image, torch.rand(1, 3, 32, 32))]))
"""


@functools.cache
def trees(root: Path, part: str = "") -> dict[Path, ast.Module]:
    return {
        file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted((root / "ssmzoo" / part).rglob("*.py"))
    }


def frames(root: Path) -> list[list[int]]:
    environment = dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1")
    result = subprocess.run(
        [sys.executable, "-c", FRAMES], capture_output=True, text=True, env=environment, cwd=root, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def foreign_lines(root: Path) -> tuple[int, int]:
    """(lines that only functions for released files use, all lines) of models/."""
    foreign = total = 0
    for file, tree in trees(root, "models").items():
        total += len(file.read_text(encoding="utf-8").splitlines())
        tops = {name: node for node in tree.body for name in defined(node)}
        users = {name: {n for n, node in tops.items() if n != name and name in names(node)} for name in tops}
        counted = {n for n in tops if is_foreign(n)}
        while more := {
            n for n in tops if n not in counted and users[n] and users[n] <= counted and not_public(tops[n])
        }:
            counted |= more
        nodes = {id(tops[n]): tops[n] for n in counted}
        for node in tops.values():
            if isinstance(node, ast.ClassDef) and id(node) not in nodes:
                nodes |= {id(m): m for m in node.body if isinstance(m, ast.FunctionDef) and is_foreign(m.name)}
        foreign += sum(node.end_lineno - node.lineno + 1 for node in nodes.values())
    return foreign, total


def is_foreign(name: str) -> bool:
    return any(word in name.lower() for word in ("official", "golden", "released", "huggingface", "from_hf"))


def not_public(node: ast.stmt) -> bool:
    return not (isinstance(node, ast.ClassDef) and any("Module" in ast.dump(b) for b in node.bases)) or is_foreign(
        node.name
    )


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]


def names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every statement below a node, without looking into expressions."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            stack += getattr(node, field, ())


@functools.cache
def imports(root: Path) -> dict[str, set[str]]:
    """Module of the package -> modules of the package that it imports anywhere in its file."""
    package = trees(root)
    modules = {}
    for file in package:
        parts = file.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    found: dict[str, set[str]] = {}
    for module, file in modules.items():
        wanted = set()
        for node in statements(package[file]):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= (inside & modules.keys()) or {node.module}
        found[module] = (wanted & modules.keys()) - {module}
    return found


def circles(root: Path) -> list[list[str]]:
    """Groups of modules each of which reaches all others."""
    graph = imports(root)
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, stack = set(), [start]
        while stack:
            for there in graph[stack.pop()]:
                if there not in seen:
                    seen.add(there)
                    stack.append(there)
        reach[start] = seen
    groups = {frozenset(b for b in reach[a] if a in reach[b]) | {a} for a in graph if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def rooms(root: Path) -> dict[str, set[str]]:
    """Room (first part of a module's name) -> rooms that it imports; single files that import nothing are left out."""
    graph: dict[str, set[str]] = {}
    for module, wanted in imports(root).items():
        here = module.split(".")[1] if "." in module else "ssmzoo"
        there = {m.split(".")[1] for m in wanted if "." in m} - {here}
        graph[here] = graph.get(here, set()) | there
    leaves = {room for room, wanted in graph.items() if not wanted and not (root / "ssmzoo" / room).is_dir()}
    return {room: wanted - leaves for room, wanted in graph.items() if room not in leaves}


def arrows(root: Path) -> str:
    """The rooms as a Mermaid graph; an arrow that follows from a chain of others is left out."""
    graph = rooms(root)

    def reach(room: str) -> set[str]:
        return graph[room].union(*(reach(there) for there in graph[room]))

    lines = []
    for room in sorted(graph):
        implied = set().union(*(reach(there) for there in graph[room]))
        lines += [f"    {room} --> {there}" for there in sorted(graph[room] - implied)]
    return "\n".join(["```mermaid", "graph LR", *lines, "```"])


REFERENCE = re.compile(r"`(?P<name>[\w.]+)` \(`(?P<file>[\w/]+\.py):(?P<line>\d+)`\)")  # `Class.method` (`file.py:12`)


def line_of(name: str, file: Path) -> int:
    """Where `function` or `Class.method` begins in a file. Raises ValueError if it does not."""
    node: ast.AST = ast.parse(file.read_text(encoding="utf-8"))
    for part in name.split("."):
        inside = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part]
        if not inside:
            raise ValueError(f"{file} has no {name}")
        node = inside[-1]
    return node.lineno


def write_page(page: Path, root: Path) -> None:
    """Draw the arrows between the page's two markers, and bring the lines of `name` (`file:line`) up to date."""
    begin, end = "<!-- arrows -->\n", "\n<!-- end of arrows -->"
    text = page.read_text(encoding="utf-8")
    text = f"{text.partition(begin)[0]}{begin}{arrows(root)}{end}{text.partition(end)[2]}"
    text = REFERENCE.sub(lambda m: f"`{m['name']}` (`{m['file']}:{line_of(m['name'], root / m['file'])}`)", text)
    page.write_text(text, encoding="utf-8")


def operator(root: Path) -> tuple[int, int]:
    """(files, lists of five or more arguments that are written out in order) of the selective scan."""
    own = ("selective_scan", "selective_scan_op", "selective_scan_torch", "selective_scan_kernels", "cuda")
    files = [
        f for f in sorted((root / "ssmzoo" / "ops").rglob("*")) if f.stem in own or f.parent.name == "selective_scan"
    ]
    files = [f for f in files if f.suffix in (".py", ".c", ".h") and f.is_file()]
    lists = 0
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())) if file.suffix == ".py" else ():
            if isinstance(node, ast.arguments):
                written = [a.arg for a in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
            elif isinstance(node, ast.Call):
                written = [a.id for a in node.args if isinstance(a, ast.Name)] + [k.arg for k in node.keywords]
            elif isinstance(node, (ast.Tuple, ast.List)):
                written = [e.id if isinstance(e, ast.Name) else getattr(e, "value", "") for e in node.elts]
            elif isinstance(node, ast.ClassDef):
                written = [s.target.id for s in node.body if isinstance(s, ast.AnnAssign)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "Tensor" in node.value:
                written = node.value.replace(",", " ").split()
            else:
                continue
            lists += sum(name in written for name in SCAN) >= 5
    return len({f.parent for f in files}), len(files), lists


def private_members(root: Path) -> list[str]:
    """`file:member` for every use of an underscored name of torch or Lightning, overridden ones included."""
    package = trees(root)
    own = {
        n.name if isinstance(n, (ast.FunctionDef, ast.ClassDef)) else n.attr
        for tree in package.values()
        for n in ast.walk(tree)
        if isinstance(n, (ast.FunctionDef, ast.ClassDef))
        or (isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    } | {n for tree in package.values() for top in tree.body for n in defined(top)}
    overridden = lightning_hooks()
    found = []
    for file, tree in package.items():
        for node in ast.walk(tree):
            name = None
            if isinstance(node, ast.Attribute):
                name = node.attr if node.attr not in own or is_torch(node) else None
            elif (
                isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "lightning")
            ):
                parts = [*node.module.split("."), *(a.name for a in node.names)]
                name = next((p for p in parts if is_private(p)), None)
            elif isinstance(node, ast.ClassDef) and is_lightnings(file, root):
                found += [
                    f"{file.relative_to(root)}:{m.name}"
                    for m in node.body
                    if isinstance(m, ast.FunctionDef) and m.name in overridden
                ]
            elif isinstance(node, ast.Constant) and node.value in overridden:
                name = node.value
            if name and is_private(name) and not (isinstance(node, ast.Attribute) and is_stdlib(node)):
                found.append(f"{file.relative_to(root)}:{name}")
    return sorted(found)


def is_lightnings(file: Path, root: Path) -> bool:
    return file.relative_to(root / "ssmzoo").parts[0] in ("tasks", "train", "data")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NOT_THEIRS


NOT_THEIRS = (
    "_asdict",
    "_fields",
    "_replace",
    "_C",
    "_target_",
    "_nothing",
    "_fingerprint",
)  # of others than these two


def base(node: ast.AST) -> str:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def is_torch(node: ast.Attribute) -> bool:
    return base(node) in ("torch", "lightning", "L", "trainer")


def is_stdlib(node: ast.Attribute) -> bool:
    return base(node) in ("os", "sys", "ctypes", "subprocess", "np")


def lightning_hooks() -> set[str]:
    import lightning as L

    return {
        n
        for cls in (L.LightningModule, L.LightningDataModule, L.Trainer, L.Callback)
        for n in dir(cls)
        if is_private(n)
    }


def constructors(root: Path) -> tuple[int, int]:
    """(most arguments of a block, of a registered model), `self` not counted."""
    registered = {
        target.rpartition(".")[2]
        for file in (root / "configs" / "model").rglob("*.yaml")
        for target in re.findall(r"_target_:\s*([\w.]+)", file.read_text())
    }
    blocks, models = 0, 0
    for part in ("layers", "models"):
        for tree in trees(root, part).values():
            for cls in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
                for method in cls.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        count = len(method.args.args) + len(method.args.kwonlyargs) - 1
                        if cls.name in registered:
                            models = max(models, count)
                        else:
                            blocks = max(blocks, count)
    return blocks, models


def named_models(root: Path) -> int:
    return len(
        {
            (module, there)
            for module, wanted in imports(root).items()
            for there in wanted
            if there.startswith("ssmzoo.models.") and module.split(".")[1] in ("ops", "layers", "probes")
        }
    )


def measure(root: Path) -> dict[str, str]:
    language, image = frames(root)
    foreign, total = foreign_lines(root)
    found = circles(root)
    folders, files, lists = operator(root)
    blocks, models = constructors(root)
    sizes = sorted(len(f.read_text(encoding="utf-8").splitlines()) for f in trees(root))
    return {
        "frames of Mamba, 1 layer (files, depth)": f"{language[0]} ({language[1]}, {language[2]})",
        "frames of VMamba, 4 blocks (files, depth)": f"{image[0]} ({image[1]}, {image[2]})",
        "foreign lines of models/": f"{foreign:,} of {total:,}",
        "circles of files": str(len(found)),
        "selective scan: folders, files, argument lists": f"{folders}, {files}, {lists}",
        "private members of torch and Lightning": str(len(private_members(root))),
        "constructor arguments, block / model": f"{blocks} / {models}",
        "model files named by probes, layers, ops": str(named_models(root)),
        "files; median and longest (lines)": f"{len(sizes)}; {sizes[len(sizes) // 2]}, {sizes[-1]}",
    }


def at_commit(commit: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "checkout"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", root, commit], cwd=ROOT, check=True)
        try:
            environment = dict(os.environ, PYTHONPATH=str(root))
            build = [sys.executable, "-m", "ssmzoo.ops.native.build"]
            subprocess.run(build, cwd=root, env=environment, check=True, capture_output=True)
            return measure(root)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", root], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commits", nargs="*", help="commits to put beside this checkout")
    parser.add_argument(
        "--details", action="store_true", help="list the circles and the private members of this checkout"
    )
    parser.add_argument(
        "--arrows",
        type=Path,
        metavar="PAGE",
        help="only draw the imports between rooms into this page, and correct its line numbers",
    )
    args = parser.parse_args()
    if args.arrows:
        return write_page(args.arrows, ROOT)
    columns = {commit: at_commit(commit) for commit in args.commits} | {"this checkout": measure(ROOT)}
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for row in columns["this checkout"]:
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")
    if args.details:
        print("\n".join(["", *map(" <-> ".join, circles(ROOT)), "", *private_members(ROOT)]))


if __name__ == "__main__":
    main()
