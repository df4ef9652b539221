"""A layer lives beside its model until a second system imports it."""

import house
import pytest
from paths import ROOT

IMPORTS = house.imports(ROOT)
LAYERS = sorted(m for m in IMPORTS if m.startswith("ssmzoo.layers.") and (ROOT / f"{m.replace('.', '/')}.py").exists())


def reached(module: str, seen: set[str]) -> set[str]:
    for there in IMPORTS.get(module, ()):
        if there not in seen:
            seen.add(there)
            reached(there, seen)
    return seen


FILES = [
    f"ssmzoo.models.{file.stem}" for file in (ROOT / "ssmzoo/models").glob("*.py")
]  # a folder holds a file's layers
SYSTEMS = {m: reached(m, set()) for m in FILES}


@pytest.mark.parametrize("layer", LAYERS)
def test_two_systems_share_it(layer):
    users = [model for model, there in SYSTEMS.items() if layer in there]
    assert len(users) >= 2, f"{layer} serves {users or 'nobody'} alone: move it there"


def test_the_layers_in_a_folder_of_models_serve_one_system():
    for folder in sorted((ROOT / "ssmzoo/models").glob("*/__init__.py")):
        inside = [m for m in IMPORTS if m.startswith(f"ssmzoo.models.{folder.parent.name}.")]
        users = {m for m in SYSTEMS if SYSTEMS[m].intersection(inside)}
        assert len(users) == 1, f"{folder.parent.name} serves {sorted(users)}: what they share belongs into layers/"
