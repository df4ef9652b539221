"""Every message that docs/troubleshooting.md explains is one that the code prints."""

import ast
import functools
import re

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.+)`$", PAGE, re.M)
ANY = "\0"  # stands for what an f-string fills in


@functools.cache
def texts() -> list[str]:
    """Every string of the package, with ANY for the values of f-strings; strings joined by + as one."""
    found = []
    for file in (ROOT / "ssmzoo").rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        found += [text(n) for n in nodes if isinstance(n, (ast.JoinedStr, ast.Constant, ast.BinOp))]
    return [t for t in found if len(t) > 8]


def text(node) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text(node.left) + text(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ANY


def test_the_page_explains_many():
    assert len(MESSAGES) >= 30 and len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_code(message):
    parts = [re.escape(part) for part in re.split(r"…", message)]
    wanted = re.compile(".*".join(parts), re.S)
    longest = max(re.split(r"…", message), key=len)
    assert len(longest) >= 8
    assert any(longest in t and wanted.search(t) for t in texts()), f"no string of the package fits {message!r}"
