"""The pages say what the code says: arrows, line numbers, links, and lines that fit a screen."""

import os
import re
from pathlib import Path

import house
import pytest
from paths import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
REFERENCES = [m.groupdict() for m in house.REFERENCE.finditer(ARCHITECTURE)]
AGAIN = "run: python benchmarks/house.py --arrows docs/architecture.md"


def test_the_drawn_arrows_are_those_of_the_code():
    drawn = ARCHITECTURE.partition("<!-- arrows -->\n")[2].partition("\n<!-- end of arrows -->")[0]
    assert drawn == house.arrows(ROOT), AGAIN


def test_the_walk_through_has_both_kinds_of_batch():
    files = {r["file"] for r in REFERENCES}
    assert {"ssmzoo/tasks/language.py", "ssmzoo/tasks/classification.py", "ssmzoo/train/optim.py"} <= files
    assert len(REFERENCES) > 40


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda r: f"{r['file']}:{r['name']}")
def test_a_named_line_holds_the_named_function(reference):
    assert int(reference["line"]) == house.line_of(reference["name"], ROOT / reference["file"]), AGAIN


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_links_to_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r"^\[[^]]+\]: (\S+)$", text, re.M)
    made = [ROOT / "docs" / room for room in ("models", "api")]  # when the site is built: tests/test_pages.py
    local = [Path(os.path.normpath(page.parent / link)) for link in links if "://" not in link]
    missing = [link for link in local if not link.exists() and link.parent not in made]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_of_ours_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w./])((?:ssmzoo|benchmarks|tests|configs|docs|tools)/[\w/]+\.(?:py|md|yaml|svg|png))\b", text
    )
    missing = {name for name in named if not (ROOT / name).exists() and "mysystem" not in name}
    assert not missing


SOURCES = [f for folder in ("ssmzoo", "configs", "tools", "benchmarks") for f in (ROOT / folder).rglob("*.[py]*")]


@pytest.mark.parametrize("file", [f for f in [*SOURCES, *PAGES] if f.suffix in (".py", ".yaml", ".md")], ids=str)
def test_nobody_is_sent_to_an_index_that_does_not_have_the_package(file):
    assert not re.search(r"install[^\n]*\bssmzoo\[", file.read_text(encoding="utf-8"))


def test_lines_of_the_readme_fit():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120]
