"""YAML from files that others wrote: plain containers, read in bounded time and memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

LARGEST_FILE = 4 << 20  # bytes
MOST_NODES = 200_000  # values, counted as often as aliases repeat them

NUMBER = re.compile(r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as OmegaConf reads it: `1e-3` is a number and a date is text; a key given twice is an error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None) if len(names) < 1000 else None
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789."))


def parse_yaml(text: str, what: str = "the text", most_nodes: int = MOST_NODES) -> Any:
    """Plain containers, strings, numbers, booleans and None from YAML (or JSON) text; None when it is empty.

    what        how error messages call the text, usually the path of its file
    most_nodes  values that it may hold once every alias is written out, which an "alias bomb" makes astronomical

    Raises ValueError for what is no YAML, needs a Python object, or is too large or nested too deeply.
    """
    loader = None
    try:
        loader = _Loader(text)  # which looks at the characters already
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}, most_nodes) <= most_nodes:
            return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{what} is not valid YAML{where}: {problem}") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply: refused") from None
    except (ValueError, TypeError, OverflowError) as error:  # a list as a key, a number of thousands of digits
        raise ValueError(f"{what} holds a value that cannot be read: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    raise ValueError(f"{what} holds more than {most_nodes:,} values with its aliases written out (or itself): refused")


def _count(node: yaml.Node, known: dict[int, int], most: int) -> int:
    """Values below a node, itself included; one that aliases name several times counts every time."""
    if id(node) not in known:
        known[id(node)] = most + 1  # met again while it is being counted: it holds itself
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = sum(_count(part, known, most) for part in parts) if isinstance(parts, list) else 0
        known[id(node)] = min(1 + below, most + 1)
    return known[id(node)]


def read_yaml(path: str | Path, largest: int = LARGEST_FILE, most_nodes: int = MOST_NODES) -> Any:
    """`parse_yaml` of a file of at most `largest` bytes. Raises ValueError (FileNotFoundError when there is none).

    A .json file, which cannot repeat a part of itself, is read by the json module, a hundred times faster.
    """
    path = Path(path)
    size = path.stat().st_size
    if size > largest:
        raise ValueError(f"{path} has {size:,} bytes, more than {largest:,}: refused")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if path.suffix.lower() != ".json":
        return parse_yaml(text, str(path), most_nodes)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: refused") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
