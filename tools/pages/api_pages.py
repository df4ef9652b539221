"""The API reference: a page per room, a `:::` line per module with something public."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "ssmzoo": "The front door: models by name, with or without weights.",
    "ops": "Functions on tensors; every operator has a sequential reference and one file per backend.",
    "layers": "Modules that at least two systems share.",
    "models": "The models' classes; [Models](../models/index.md) tells what each is.",
    "adapt": "Functions from model to model.",
    "released": "Weights that others released: what there is, and how it is read.",
    "inference": "Generate, predict, restore, score, embed, export.",
    "tasks": "Losses and metrics by kind of work.",
    "data": "Data modules, generators and automata.",
    "train": "The loop: optimiser groups, checkpoints, run folders.",
    "probes": "What a trained model looks at.",
}
FRONT = "zoo.create_model presets.list_models released.load.load_official timm hf spandrel".split()
DISPATCH = ("backend", "observe", "chosen_backend", "backend_table")


def operators() -> list[str]:
    """Dotted names of what ssmzoo/ops/__init__.py takes from its folders."""
    tree = ast.parse((ROOT / "ssmzoo" / "ops" / "__init__.py").read_text(encoding="utf-8"))
    taken = [(n.module, a.name) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    return [f"{module}.{name}" for module, name in taken if name.islower() and not module.endswith("dispatch")]


def modules(room: str) -> list[str]:
    """Dotted names of a room's modules that define something public with a docstring; of operators, of themselves."""
    if room == "ssmzoo":
        return [f"ssmzoo.{name}" for name in FRONT]
    if room == "ops":
        return [*(f"ssmzoo.ops.dispatch.{name}" for name in DISPATCH), *operators()]
    found = []
    for file in sorted((ROOT / "ssmzoo" / room).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[-1].startswith("_") and parts[-1] != "__init__":
            continue
        public = [
            node
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != "_" and ast.get_docstring(node)
        ]
        if public:
            found.append(".".join(p for p in parts if p != "__init__"))
    return found


def dotted(room: str) -> str:
    return room if room == "ssmzoo" else f"ssmzoo.{room}"


def page(room: str) -> str:
    names = modules(room)
    body = "\n\n".join(f"::: {name}" for name in names)
    return f"# {dotted(room)}\n\n{ROOMS[room]}\n\n{body}\n"


def index() -> str:
    rows = "\n".join(f"| [{dotted(r)}]({r}.md) | {text} |" for r, text in ROOMS.items())
    return (
        f"# Python API\n\nFrom the docstrings: shapes, dtypes, units, errors.\n\n| room | holds |\n|---|---|\n{rows}\n"
    )
