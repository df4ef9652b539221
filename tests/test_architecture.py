"""The shape of the package: imports point one way, importing is light, configs and models agree."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import house
import pytest
from paths import ROOT

LEAVES = (
    "suggest",
    "terminal",
    "threads",
    "safe_yaml",
    "moved",
    "deprecated",
    "_torchvision",
    "_torchmetrics",
)  # they import nothing of ours
ORDER = ("ops", "layers", "presets", "models", "adapt", "released", "checkpoint_files", "zoo", "inference", "tasks")
ORDER += ("train", "verify", "cli")  # a part imports itself, leaves, and what stands left of it
BESIDE = {  # these stand beside the order: what they import
    "data": ("ops",),
    "probes": ("ops", "layers", "presets", "released", "checkpoint_files", "zoo", "inference", "data"),
    "hf": ("inference",),
    "spandrel": ("released",),
    "timm": ("ops", "layers", "presets", "released", "checkpoint_files", "zoo"),
    "__init__": (),
}
KNOW_DATA = ("inference", "train", "verify", "cli", "probes")
KNOW_PROBES = ("verify", "cli")
KNOW_TIMM = ("inference",)
IMPORTS = house.imports(ROOT)


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def allowed(here: str) -> set[str]:
    if here in LEAVES:
        return set()
    left = BESIDE[here] if here in BESIDE else ORDER[: ORDER.index(here)]
    more = ("data",) * (here in KNOW_DATA) + ("probes",) * (here in KNOW_PROBES)
    more += ("timm",) * (here in KNOW_TIMM)
    return {here, *left, *more, *LEAVES}


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_imports_point_one_way(module):
    """Imports within functions count like those at the top."""
    wrong = {there for there in IMPORTS[module] if part(there) not in allowed(part(module)) and there != "ssmzoo"}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"


def test_no_files_import_each_other():
    assert house.circles(ROOT) == []


@functools.cache
def bound(file: Path) -> frozenset[str]:
    """Names that the statements of a file bind, those within its functions and classes left out."""
    names, stack = set(), list(ast.parse(file.read_text(encoding="utf-8")).body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name):
            names.add(node.id)
        else:
            stack.extend(ast.iter_child_nodes(node))
    return frozenset(names)


def test_what_scripts_import_is_there():
    """From each other and from the package, within functions too: most benchmarks run too seldom to tell."""
    wrong, seen = [], 0
    for script in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            for base in (ROOT, script.parent):
                path = base.joinpath(*node.module.split("."))
                file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)
                if file is None or "__getattr__" in bound(file):
                    continue
                for name in {alias.name for alias in node.names} - bound(file) - {"__path__"}:
                    if not (path / name).with_suffix(".py").exists() and not (path / name).is_dir():
                        wrong.append(f"{script.name} imports {name} from {node.module}")
                seen += 1
    assert wrong == [] and seen > 100


def test_models_hold_nothing_of_other_repositories():
    assert house.foreign_lines(ROOT)[0] == 0


def test_few_private_members_of_torch_and_lightning():
    found = house.private_members(ROOT)
    assert len(found) <= 8, "\n".join(found)


def test_a_pass_walks_through_few_of_our_functions():
    (language, *_), (image, *_) = house.frames(ROOT)
    assert language <= 40 and image <= 250


def test_constructors_are_short():
    blocks, models = house.constructors(ROOT)
    assert blocks <= 12 and models <= 18


def test_import_is_light():
    heavy = (
        "lightning",
        "hydra",
        "timm",
        "torchvision",
        "torchmetrics",
        "wandb",
        "datasets",
        "transformers",
        "matplotlib",
    )
    code = f"import sys, ssmzoo, ssmzoo.ops, ssmzoo.zoo; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_models_are_found_and_unknown_ones_are_refused_with_the_nearest():
    import ssmzoo

    assert {"mamba", "moe_mamba", "transformer"} <= set(ssmzoo.list_models())
    assert "moe_mamba" in ssmzoo.list_models("*mamba*", task="language")
    with pytest.raises(ValueError, match="nearest: .*moe_mamba"):
        ssmzoo.create_model("moe_mambo")
    with pytest.raises(TypeError, match="d_modell.*nearest: d_model"):
        ssmzoo.create_model("mamba", d_modell=8)


def test_unknown_official_family_and_argument():
    import ssmzoo

    with pytest.raises(ValueError, match="unknown family 'mamb'.*nearest: mamba"):
        ssmzoo.load_official("mamb", {})
