"""What a checkpoint says about where it comes from."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def manifest(run, trainer) -> dict[str, Any]:
    """Model, configuration, versions, data, metrics and threads; a step is the number of updates done."""
    data, metrics = run.data, {k: float(v) for k, v in trainer.callback_metrics.items()}
    content = {
        "model": run.model_name,
        "config": run.plain,
        "versions": versions(),
        "git_commit": git_commit(),
        "data": data.describe() if hasattr(data, "describe") else {},
        "metrics": metrics,
        "monitor": {"name": f"val/{run.task.monitor}", "mode": run.task.mode},
        "threads": torch.get_num_threads(),
        "first_row": 1,  # the step of the first update's row in metrics.csv, which was 0 once
    }
    if hasattr(data, "classes") and hasattr(data, "normalisation"):
        content |= {"classes": list(data.classes), "picture": picture(data)}
    tokenizer = getattr(data, "tokenizer", None)
    return content | ({"tokenizer": tokenizer.to_dict()} if tokenizer is not None else {})


def picture(data) -> dict[str, Any]:
    """How validation pictures are prepared, as `ssmzoo.released.catalogue.Picture` has it."""
    mean, std = data.normalisation()
    return {
        "size": getattr(data, "picture_size", data.image_size),
        "crop": data.crop_pct,
        "mean": list(mean),
        "std": list(std),
    }


@functools.cache
def versions() -> dict[str, str]:
    import ssmzoo

    found = {"ssmzoo": ssmzoo.__version__, "python": sys.version.split()[0]}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "lightning", "hydra-core", "numpy")}


@functools.cache
def git_commit() -> str | None:
    if not os.environ.get("PATH"):
        return None
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def threads_note(saved: dict[str, Any]) -> str:
    """What to know before a run goes on with another number of threads; empty when it is the same."""
    before, now = saved.get("threads"), torch.get_num_threads()
    if before in (None, now):
        return ""
    return (
        f"note: the run was computed with {before} thread(s), now there are {now}; sums are taken in another order, so "
        f"losses go on to rounding and not bit for bit (OMP_NUM_THREADS={before} makes them equal)"
    )
