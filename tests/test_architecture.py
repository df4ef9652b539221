"""The shape of the package: imports point one way, importing is light, configs and models agree."""

import subprocess
import sys

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
