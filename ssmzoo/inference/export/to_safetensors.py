"""The zoo's own tensor names, for any program that reads safetensors."""

from __future__ import annotations

from pathlib import Path

from ssmzoo.inference.export.source import Source, save_tensors


def refuse(source: Source) -> str | None:
    return None


def write(source: Source, folder: Path) -> None:
    save_tensors(source.model.state_dict(), folder / "model.safetensors")


def usage(source: Source) -> str:
    return '```python\nfrom safetensors.torch import load_file\nstate = load_file("model.safetensors")\n```'
