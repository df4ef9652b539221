"""The notebooks run from beginning to end on the shipped checkpoints."""

from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = ("hidden_attention", "explain_a_prediction", "token_dynamics", "memory")


@pytest.mark.slow
@pytest.mark.parametrize("file", [NOTEBOOKS / f"{name}.ipynb" for name in NAMES], ids=lambda f: f.stem)
def test_notebook_runs(file, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient runs notebooks: pip install nbclient ipykernel")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel", reason="notebooks need a kernel: pip install ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    notebook = nbformat.read(file, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    shown = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in shown), "no figure was drawn"
