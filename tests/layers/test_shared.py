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


SYSTEMS = {m: reached(m, set()) for m in IMPORTS if m.startswith("ssmzoo.models.")}


@pytest.mark.parametrize("layer", LAYERS)
def test_two_systems_share_it(layer):
    users = [model for model, there in SYSTEMS.items() if layer in there]
    assert len(users) >= 2, f"{layer} serves {users or 'nobody'} alone: move it there"
