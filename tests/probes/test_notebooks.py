"""The notebooks run from beginning to end on the shipped checkpoints."""

import importlib.util
import json

import pytest
from paths import NOTEBOOKS

NAMES = ("hidden_attention", "explain_a_prediction", "token_dynamics", "memory", "restoration")
FIRST = ("train", "generate", "finetune", "probe")  # what people do first; their first cell installs


def script(name):
    spec = importlib.util.spec_from_file_location(name, NOTEBOOKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recipes_are_those_of_the_shipped_checkpoints():
    """`make checkpoints` trains what lies in notebooks/checkpoints, option by option."""
    pytest.importorskip("hydra")
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    recipes = script("make_checkpoints").RECIPES
    names = {folder.name for folder in (NOTEBOOKS / "checkpoints").iterdir()}
    assert names and names <= set(recipes)
    for name in names:
        shipped = json.loads((NOTEBOOKS / "checkpoints" / name / "manifest.json").read_text())["config"]
        with initialize_config_dir(str(NOTEBOOKS.parent / "configs"), version_base=None):
            recipe = OmegaConf.to_container(compose("train", overrides=recipes[name]), resolve=False)
        for group in ("model", "task", "data", "optim"):
            for key, value in recipe[group].items():
                later = key not in shipped[group]  # an option that the trainer has got since
                if key != "num_workers" and not later and not str(value).startswith("${"):
                    assert shipped[group][key] == value, (name, group, key)
        assert shipped["trainer"]["max_steps"] == recipe["trainer"]["max_steps"]


def test_every_probe_is_run_and_documented_with_its_figure():
    from ssmzoo.probes.names import probes

    runs = script("run_probes")
    text = (NOTEBOOKS.parent / "docs" / "probes.md").read_text()
    assert set(runs.APPLY) == set(probes()) and {name for name, _, _ in runs.FIGURES.values()} == set(probes())
    for figure in runs.FIGURES:
        assert f"figures/probe_{figure}.png" in text, figure
        assert (NOTEBOOKS.parent / "docs" / "figures" / f"probe_{figure}.png").stat().st_size > 5000
    assert all(f"## {name}\n" in text for name in probes())


@pytest.mark.slow
@pytest.mark.parametrize("file", [NOTEBOOKS / f"{name}.ipynb" for name in (*NAMES, *FIRST)], ids=lambda f: f.stem)
def test_notebook_runs(file, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="notebooks need a kernel: pip install ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in shown) or file.stem == "generate", "no figure was drawn"


@pytest.mark.parametrize("name", FIRST)
def test_the_first_cell_installs_and_nothing_is_kept(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert "pip" in "".join(code[0]["source"]) and not any(c["outputs"] for c in code)
