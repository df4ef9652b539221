"""Tests of Triton kernels without a GPU: a file runs once more, in a process in which they are interpreted."""

import functools
import os
import subprocess
import sys

import pytest

from ssmzoo.ops.triton import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
outside = pytest.mark.skipif(INTERPRETED, reason="this is that process")

if INTERPRETED:  # patches triton.language once, not at every launch and every call of a function: a fifth of the time
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        _patch = functools.cache(interpreter._patch_lang)
        interpreter._patch_lang = lambda fn: _patch(fn) and interpreter._LangPatchScope()


def interpret(file: str) -> None:
    """All tests of `file` through the interpreter; those marked `interpreted` run there alone."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def set_sizes(monkeypatch, *modules: tuple) -> None:
    """Tiles of an interpreter's size: (module, {name: value}) pairs."""
    for module, sizes in modules:
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
