"""`ssmzoo doctor`: what a bug report needs: versions, kernels, GPU, caches, and what is missing for what."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import os
import platform
import re
import sys
from pathlib import Path

LIBRARIES = ("torch triton lightning hydra-core numpy safetensors huggingface_hub timm transformers peft mamba-ssm "
             "causal-conv1d").split()  # fmt: skip


def add_parser(subparsers) -> argparse.ArgumentParser:
    return subparsers.add_parser("doctor", help="versions, kernels, GPU, caches and missing extras, for a bug report")


def run(args) -> None:
    for title, lines in (
        ("Versions", versions()),
        ("Kernels", kernels()),
        ("GPU", gpus()),
        ("Settings", settings()),
        ("Extras", extras()),
    ):
        print(f"{title}\n" + "\n".join(f"  {name:<18}{value}" for name, value in lines) + "\n")


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> list[tuple[str, str]]:
    import ssmzoo

    own = [("ssmzoo", f"{ssmzoo.__version__} in {Path(ssmzoo.__file__).parent}")]
    own += [("python", f"{platform.python_version()} ({sys.executable})"), ("system", platform.platform())]
    return own + [(name, installed(name) or "-") for name in LIBRARIES]


def kernels() -> list[tuple[str, str]]:
    """Instruction set of the compiled kernels or why there are none, threads, how many operators a backend serves."""
    import torch

    from ssmzoo.ops import backend_table
    from ssmzoo.ops.native import LEVEL, MISSING

    rows = [row for row in backend_table() if row.backend not in ("torch", "reference")]
    served = {name: sum(r.available for r in rows if r.backend == name) for name in {r.backend for r in rows}}
    lines = [("CPU", LEVEL if MISSING is None else f"none: {MISSING}")]
    lines += [("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")]
    return lines + [(name, f"can serve {count} operators (ssmzoo backends)") for name, count in sorted(served.items())]


def gpus() -> list[tuple[str, str]]:
    import torch

    if not torch.cuda.is_available():
        return [("none", f"torch {torch.__version__} sees no CUDA or ROCm device")]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(f"cuda:{i}", f"{p.name}, {p.total_memory / 2**30:.0f} GiB") for i, p in enumerate(found)]


def settings() -> list[tuple[str, str]]:
    """Where files are kept, and every variable of the environment that changes what runs."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from torch.hub import get_dir

    lines = [("hub cache", HF_HUB_CACHE), ("torch cache", get_dir())]
    names = re.compile("SSMZOO_|OMP_|MKL_|CUDA_VISIBLE|HF_(HOME|HUB|ENDPOINT)|TORCH_HOME|TRITON_|WANDB_(MODE|BASE_URL)")
    return lines + [(key, value) for key, value in sorted(os.environ.items()) if names.match(key)]


def extras() -> list[tuple[str, str]]:
    """Every extra of the package: complete, or what it lacks."""
    wanted: dict[str, list[str]] = {}
    for requirement in metadata.requires("ssmzoo") or []:
        package, _, marker = requirement.partition(";")
        extra = re.search(r"""extra == ["'](\w+)["']""", marker)
        if extra and ("platform_system" not in marker or platform.system() in marker):
            wanted.setdefault(extra[1], []).append(package.strip())
    lines = []
    for name, packages in wanted.items():
        missing = [p for p in packages if installed(re.match(r"[\w.-]+", p)[0]) is None]
        lines.append((name, "pip install " + " ".join(f"'{p}'" for p in missing) if missing else "complete"))
    return lines
