"""Hooks of mkdocs.yml: pages made from the code, and links that leave docs/."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}


def generated() -> dict[str, str]:
    """{path in the site: Markdown} of the pages that no file in docs/ holds."""
    import api_pages
    import model_pages

    pages = {target: (ROOT / source).read_text(encoding="utf-8") for source, target in COPIED.items()}
    pages["models/index.md"] = model_pages.index()
    pages |= {f"models/{f.stem}.md": model_pages.page(f) for f in model_pages.model_files()}
    pages["api/index.md"] = api_pages.index()
    return pages | {f"api/{room}.md": api_pages.page(room) for room in api_pages.ROOMS}


def on_config(config):
    """The lists of models, rooms and pages that nobody put anywhere end the navigation."""
    sys.path[:0] = [str(HERE), str(ROOT)]  # mkdocs takes back what a hook's module adds while it is loaded
    import api_pages
    import model_pages

    models = ["models/index.md", *(f"models/{f.stem}.md" for f in model_pages.model_files())]
    api = ["api/index.md", *(f"api/{room}.md" for room in api_pages.ROOMS)]
    listed = set(re.findall(r"[\w/-]+\.md", repr(config.nav)))
    docs = ROOT / "docs"
    rest = [f.relative_to(docs).as_posix() for f in sorted(docs.rglob("*.md"))]
    rest = [page for page in rest if page not in listed]
    for entry in config.nav:
        (name, pages), *_ = entry.items() if isinstance(entry, dict) else [(None, None)]
        if name == "Models":
            pages[:] = models
        if name == "Reference":
            next(p for p in pages if isinstance(p, dict) and "Python API" in p)["Python API"][:] = api
        if name == "Benchmarks":
            pages += [p for p in rest if p.startswith("results/")]
        if name == "Guides":
            pages += [p for p in rest if not p.startswith("results/")]
    return config


def on_files(files: Files, config) -> Files:
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links to files of the checkout become links within the site, or plain code where the site has no such page."""
    folder = posixpath.dirname(page.file.src_uri)
    outside = "" if page.file.src_uri in COPIED.values() else "docs"
    fences = re.split(r"(^ *```.*?^ *```)", markdown, flags=re.S | re.M)

    def mend(found: re.Match) -> str:
        text, link, anchor = found.groups()
        if "://" in link or link.startswith(("mailto:", "#")):
            return found.group()
        target = posixpath.normpath(posixpath.join(outside, folder, link))
        inside = COPIED.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if target == "README.md":
            inside = "index.md"
        if inside is None or files.get_file_from_path(inside) is None:
            return found.group() if inside is not None else f"`{text}`" if "`" not in text else text
        return f"[{text}]({posixpath.relpath(inside, folder or '.')}{anchor or ''})"

    fences[::2] = [re.sub(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", mend, part) for part in fences[::2]]
    return "".join(fences)
