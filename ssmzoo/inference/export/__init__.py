"""What was trained or loaded here, in the layout of another program: `export("runs/mamba", "hf", "out")`.

A format is a file `to_<format>.py` beside this one. It holds

    refuse(source) -> str | None     why a model has no such layout; None when it has
    write(source, folder) -> None    the files, into a folder that exists; with type=... where the format has TYPES
    usage(source) -> str             how the other program reads them, for the model card

and its docstring's first line is its description. Nothing else lists the formats.
"""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import sys
from pathlib import Path
from types import ModuleType

from ssmzoo.inference.export.card import model_card
from ssmzoo.inference.export.source import Source, read_source
from ssmzoo.suggest import nearest

PREFIX = "to_"


def formats() -> dict[str, ModuleType]:
    """Every format by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(PREFIX))
    return {name.removeprefix(PREFIX): importlib.import_module(f"{__name__}.{name}") for name in names}


def find_format(name: str) -> ModuleType:
    """A format by name; ValueError names the nearest."""
    known = formats()
    if name not in known:
        raise ValueError(f"unknown export format {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def refusal(name: str, source: Source) -> str | None:
    """Why a model has no such layout; None when it has."""
    if source.quantisation is not None and name != "hf":
        return "its weights are integers of our own form; export the checkpoint it was made of"
    return find_format(name).refuse(source)


def check_options(name: str, chosen: ModuleType, options: dict[str, str]) -> None:
    """Refuse a type that a format does not have."""
    types = getattr(chosen, "TYPES", {})
    for key, value in options.items():
        if key != "type" or not types:
            raise ValueError(f"layout {name!r} has no {key}; gguf has types")
        if value not in types:
            raise ValueError(f"unknown type {value!r}{nearest(value, types)}; choose one of {', '.join(types)}")


def export(checkpoint: str | Path | Source, to: str, out: str | Path, **options: str) -> Path:
    """Write a model in another program's layout, with a model card; either the whole folder appears or nothing.

    checkpoint  a run folder or checkpoint of ours, or a released file or folder in official names
    to          one of `formats()`
    out         folder to be made
    options     of the format: type="q8_0" for gguf (f32, f16, q8_0, q4_0)

    Raises ValueError for a format that the model does not have, naming those it has, and FileExistsError.
    """
    chosen, out = find_format(to), Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another --out")
    check_options(to, chosen, options)
    source = checkpoint if isinstance(checkpoint, Source) else read_source(checkpoint)
    if reason := refusal(to, source):
        others = [name for name in formats() if refusal(name, source) is None]
        raise ValueError(f"{source.name} has no layout {to!r}: {reason}; it has {', '.join(others)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        chosen.write(source, temporary, **options)
        command = " ".join(["ssmzoo", *sys.argv[1:]]) if sys.argv[1:2] == ["ckpt"] else None
        text = model_card(source, to, chosen.usage(source), command)
        (temporary / "README.md").write_text(text, encoding="utf-8")
        temporary.rename(out)
    finally:  # a full disk or an interrupt leaves nothing behind
        shutil.rmtree(temporary, ignore_errors=True)
    return out
