"""The kernels' exponential on every instruction set that this machine runs, beside float64."""

import ctypes
from pathlib import Path

import pytest
import torch

from ssmzoo.ops import native

FOLDER = Path(native.__file__).parent
EXACT_FROM = -125  # below, an error of 2^-125 is allowed


def exponential(level: str, reach: int):
    path = FOLDER / f"_kernels.{level}.so"
    if native.KERNELS is None or not path.exists() or not native.KERNELS.ssmzoo_cpu_runs(level.encode()):
        pytest.skip(native.MISSING or f"no kernels for {level} here")
    function = ctypes.CDLL(str(path)).ssmzoo_exponentials
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

    def of(x: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(-(-len(x) // 16) * 16)
        padded[: len(x)] = x
        y = torch.empty_like(padded)
        function(padded.data_ptr(), y.data_ptr(), len(padded), reach)
        return y[: len(x)]

    return of


@pytest.fixture(params=native.LEVELS)
def level(request):
    return request.param


ANY, AT_MOST_BOUND, WITHIN_BOUND = range(3)  # vec.h


@pytest.mark.parametrize("sure", [ANY, AT_MOST_BOUND, WITHIN_BOUND])
def test_relative_error(level, sure):
    exp2 = exponential(level, sure)
    reach = 120.0 if sure else 127.99
    near = torch.cat([s * 2.0 ** -torch.arange(1.0, 30) for s in (1, -1)])
    ties = torch.arange(-120 * 16, 120 * 16) / 16.0  # halves and sixteenths: where rounding turns
    x = torch.cat(
        [
            torch.linspace(-120 if sure == WITHIN_BOUND else EXACT_FROM, reach, 400_003),
            torch.linspace(-1, 1, 100_003),
            near,
            ties,
        ]
    )
    exact = torch.exp2(x.double())
    assert ((exp2(x).double() - exact).abs() / exact).max() < 2e-7
    assert exp2(torch.arange(-120.0, 121)).equal(torch.exp2(torch.arange(-120.0, 121).double()).float())


def test_edges(level):
    exp2, inf = exponential(level, ANY), float("inf")
    x = torch.tensor([inf, 128.0, 1e30, -inf, -1e30, -200.0, 0.0, -0.0, 127.999])
    y = exp2(x)
    assert y[:3].isinf().all() and (y[:3] > 0).all()
    assert y[3:6].equal(torch.zeros(3)) and y[6:8].equal(torch.ones(2))
    assert y[8].isfinite()
    tiny = torch.linspace(-151, EXACT_FROM, 10_001)
    assert (exp2(tiny).double() - torch.exp2(tiny.double())).abs().max() <= 2.0**-125


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFAAAAAA])
@pytest.mark.parametrize("sure", [ANY, AT_MOST_BOUND, WITHIN_BOUND])
def test_every_kind_of_nan_stays_one(level, bits, sure):
    x = torch.tensor([bits - (1 << 32) if bits >> 31 else bits], dtype=torch.int32).view(torch.float32)
    assert exponential(level, sure)(x).isnan().all()
