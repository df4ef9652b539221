"""Products with few vectors (native/matrix.c) beside sums in double: in every built library, and under qemu."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from against_reference import native

from ssmzoo import ops
from ssmzoo.ops.native import build
from ssmzoo.ops.quantized_linear import pack_int4

KERNELS = Path(build.HERE)
ARM, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def check(compiler: list[str], kernels: list[Path], run: list[str], tmp_path) -> None:
    program = tmp_path / "check"
    command = [
        *compiler,
        "-std=gnu11",
        "-O1",
        f"-I{KERNELS}",
        str(Path(__file__).with_name("matrix_check.c")),
        *map(str, kernels),
        "-o",
        str(program),
        "-lm",
        "-pthread",
    ]
    subprocess.run(command, check=True)
    lines = subprocess.run([*run, str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 6
    for bits, act, error in map(str.split, lines):
        rounded = bits != "32" and act == "0"  # activations of 16 bits: half a unit of the largest of a piece
        assert float(error) < (2**-16 if rounded else 1e-6), (bits, act, error)


@native
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.parametrize("level", build.levels())
def test_every_instruction_set_of_this_machine(level, tmp_path):
    if level != "plain" and platform.machine() == "x86_64" and level not in flags():
        pytest.skip(f"this processor has no {level}")
    check(["gcc", *build.levels()[level]], [KERNELS / f"_kernels.{level}.so"], [], tmp_path)


def flags() -> set[str]:
    words = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {level for level, word in (("avx512", "avx512bw"), ("avx2", "avx2")) if word in words}


@pytest.mark.skipif(not (shutil.which(ARM) and shutil.which(QEMU)), reason=f"needs {ARM} and {QEMU} (qemu-user)")
def test_neon_under_qemu(tmp_path):
    check([ARM, "-static", "-O2"], [KERNELS / "matrix.c", KERNELS / "parallel.c"], [QEMU], tmp_path)


@native
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [1, 7, 9, 33, 70])
def test_any_number_of_tokens_and_threads(tokens, threads, monkeypatch):
    """Against float64, outputs poisoned; 70 tokens meet the matrix as floats."""
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    try:
        for bits, e, d, group in ((8, 200, 300, 300), (4, 333, 260, 52), (8, 1, 5, 2), (4, 40, 128, 64)):
            codes = torch.randint(-8, 8, (e, d), dtype=torch.int8)
            scale, x = torch.rand(e, -(-d // group)) + 0.1, torch.randn(tokens, d)
            given = x, pack_int4(codes) if bits == 4 else codes, scale
            wide = ops.quantized_linear.reference(x.double(), given[1], scale.double(), bits=bits, group_size=group)
            with ops.backend("c"):
                found = ops.quantized_linear(*given, bits=bits, group_size=group)
            assert (found - wide).norm() <= 1e-4 * wide.norm()
    finally:
        torch.set_num_threads(before)


@native
@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 700, 300), (8, 33, 17), (3, 1, 1)])
def test_a_few_tokens_through_a_linear_map(shape):
    tokens, e, d = shape
    x, weight, bias = torch.randn(tokens, d), torch.randn(e, d), torch.randn(e)
    with ops.backend("c"):
        found = ops.linear_act(x, weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert (found - expected).norm() <= 1e-6 * expected.norm()
