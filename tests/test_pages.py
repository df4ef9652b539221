"""The documentation site: pages made from the code say what the code says; `make docs` builds all of it."""

import ast
import importlib
import re
import subprocess
import sys

import pytest
from paths import ROOT

sys.path.append(str(ROOT / "tools" / "pages"))
import api_pages  # noqa: E402
import docstrings  # noqa: E402
import model_pages  # noqa: E402


def test_every_preset_stands_on_one_page():
    from ssmzoo import list_models

    shown = [name for names in model_pages.presets().values() for name in names]
    assert sorted(shown) == list_models()


def test_a_page_has_equation_figure_sizes_weights_parity_results_and_differences():
    text = model_pages.page(ROOT / "ssmzoo" / "models" / "vim.py")
    assert text.startswith("# Vim\n") and "[x, z] = W_in u" in text
    assert '<svg class="block-figure"' in text and "in which a forward pass calls them" in text
    assert "| `vim_tiny` | 7,148,008 | 1.83 |" in text  # as docs/results/vision.md
    assert "## Released weights" in text and "vim_tiny" in text.partition("## Released weights")[2]
    cases = re.findall(r"^\| vim \| \w+ \| \S+ \| \S+ \| (\S+) \|$", text, re.M)
    assert len(cases) == len(list((ROOT / "tests/golden/vim").glob("*.json"))) and set(cases) == {"ok"}
    assert "## Measured" in text and "## How it differs" in text and "2401.09417" in text


@pytest.mark.parametrize("file", model_pages.model_files(), ids=lambda f: f.stem)
def test_a_header_says_what_the_system_is_and_where_it_comes_from(file):
    header = docstrings.parts_of_header(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))))
    assert len(header["claim"]) > 20 and header["source"]


def test_equations_and_columns_keep_their_spaces_and_prose_is_escaped():
    text = docstrings.to_markdown(
        "First *line* with W_x.\n\n    y = a * b\n\nx    (b l)\nlong text between\ny    (b)\n"
    )
    first, equation, columns = text.split("\n\n")
    assert first == r"First \*line\* with W\_x."
    assert equation == "```text\ny = a * b\n```"
    assert columns == "```text\nx    (b l)\nlong text between\ny    (b)\n```"


@pytest.mark.parametrize("room", api_pages.ROOMS)
def test_every_name_of_the_reference_exists(room):
    names = api_pages.modules(room)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        here = ROOT.joinpath(*name.split("."))
        assert here.is_dir() or here.with_suffix(".py").exists() or hasattr(importlib.import_module(module), attribute)


def test_the_site_fetches_nothing():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8") + (ROOT / "docs/assets/site.css").read_text()
    assert "http" not in text and "font: false" in text


@pytest.mark.slow
def test_the_site_is_built_strictly():
    pytest.importorskip("material", reason="pip install '.[docs]' in the checkout")
    pytest.importorskip("mkdocstrings_handlers.python", reason="pip install '.[docs]' in the checkout")
    subprocess.run([sys.executable, "tools/pages/build.py"], cwd=ROOT, check=True)
    assert len(list((ROOT / "build/site/models").glob("*.html"))) == len(model_pages.model_files()) + 1
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preload)[^>]*https?:"
    )
    for page in (ROOT / "build/site").rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page
