"""The tabs of `ssmzoo demo`: each file has KIND, the runs that it shows, and `tab(gr, {name: folder})`."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.lru_cache(maxsize=4)
def subject(folder: Path):
    """A trained model with what it needs, kept for the next call."""
    import torch

    from ssmzoo.inference.subject import load_subject

    loaded = load_subject(str(folder))
    if loaded.tokenizer is not None:
        with torch.no_grad():
            loaded.model(torch.zeros(1, 16, dtype=torch.long))  # a first call is slow; others are timed
    return loaded


def choice(gr, runs: dict[str, Path]):
    return gr.Dropdown(list(runs), value=next(iter(runs)), label="run")
