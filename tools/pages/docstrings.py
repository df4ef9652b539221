"""Docstrings of the package as Markdown: prose stays prose, equations and columns keep their spaces."""

from __future__ import annotations

import inspect
import re

COLUMNS = re.compile(r"\S(  +)\S")  # two spaces within a line: a column
DIFFERS = re.compile(
    r"\b(differs?\b|paper and (released )?code|released code|not taken over|left out|the paper (does|states|has no)|"
    r"unlike|rewritten|written anew)",
    re.I,
)


def paragraphs(text: str) -> list[str]:
    """Blocks between blank lines, equations split from the prose that they stand in."""
    found: list[list[str]] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines, before = block.splitlines(), None
        for line, now in zip(lines, fixed_lines(lines)):
            if now != before:
                found.append([])
            before = now
            found[-1].append(line)
    return ["\n".join(lines) for lines in found]


def fixed_lines(lines: list[str]) -> list[bool]:
    """Which lines keep their spaces: indented ones, columns, and what stands between columns."""
    columns = [i for i, line in enumerate(lines) if COLUMNS.search(line) and not line.startswith("  ")]
    first, last = (columns[0], columns[-1]) if columns else (0, -1)
    return [line.startswith("  ") or first <= i <= last for i, line in enumerate(lines)]


def is_fixed(paragraph: str) -> bool:
    return all(fixed_lines(paragraph.splitlines()))


def escape(prose: str) -> str:
    """Marks that Markdown would read are escaped outside of `code`."""
    parts = re.split(r"(`[^`]*`)", prose)
    parts[::2] = [re.sub(r"([*_\[\]|])", r"\\\1", p.replace("&", "&amp;").replace("<", "&lt;")) for p in parts[::2]]
    return "".join(parts)


def fenced(paragraph: str) -> str:
    lines = inspect.cleandoc("\n" + paragraph).strip("\n")
    return f"```text\n{lines}\n```"


def to_markdown(text: str) -> str:
    """The docstring with its equations and columns in fences."""
    return "\n\n".join(fenced(p) if is_fixed(p) else escape(p) for p in paragraphs(text))


def parts_of_header(text: str) -> dict[str, str]:
    """{"name", "claim", "body", "differs", "source"} of a model file's header, the last three as Markdown."""
    first, *rest = paragraphs(text)
    title = " ".join(first.split())
    name, colon, claim = title.partition(": ")
    name = re.sub(r" \(.*\)", "", name)
    body, differs, source = [], [], []
    for paragraph in rest:
        if is_fixed(paragraph):
            body.append(fenced(paragraph))
            continue
        before, found, behind = paragraph.partition("Source: ")
        if found:
            source.append(escape(" ".join(behind.split())))
        sentences = re.split(r"(?<=[.;])\s+(?=[A-Z`])", before.strip())
        start = next((i for i, s in enumerate(sentences) if DIFFERS.search(s)), len(sentences))
        if kept := " ".join(sentences[:start]).strip():
            body.append(escape(kept))
        if moved := " ".join(sentences[start:]).strip():
            differs.append(escape(moved))
    return {
        "name": name if colon and len(name) < 60 else "",
        "claim": escape(claim if colon and len(name) < 60 else title),
        "body": "\n\n".join(body),
        "differs": "\n\n".join(differs),
        "source": " ".join(source),
    }
