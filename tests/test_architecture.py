"""The shape of the package: imports point one way, importing is light, configs and models agree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

ORDER = ["ops", "layers", "models", "tasks", "train", "cli"]  # a part may import itself and what stands left of it
FORBIDDEN = {"data": ["models", "layers", "tasks", "train", "cli"], "probes": ["train", "cli", "tasks"]}
FILES = sorted((ROOT / "ssmzoo").rglob("*.py"))


def top_level_imports(file: Path):
    """(line, imported part of ssmzoo) of every import statement, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = (
            [node.module]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
        for name in names:
            if name and name.startswith("ssmzoo."):
                yield node.lineno, name.split(".")[1]


@pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
def test_imports_point_one_way(file):
    here = file.relative_to(ROOT / "ssmzoo").parts[0]
    for line, there in top_level_imports(file):
        if here in ORDER and there in ORDER:
            assert ORDER.index(there) <= ORDER.index(here), f"{file}:{line}: {here} imports {there}"
        assert there not in FORBIDDEN.get(here, []), f"{file}:{line}: {here} imports {there}"
        if here in ("ops", "layers", "models"):
            assert there != "data", f"{file}:{line}: {here} imports data"


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
