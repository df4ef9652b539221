"""quantized_linear against sums written out in float64, on every backend that serves the call."""

from __future__ import annotations

import pytest
import torch

from ssmzoo.ops import OPERATORS, backend, quantized_linear
from ssmzoo.ops.quantized_linear import pack_int4, unpack_int4

CASES = [(1, 8, 3), (3, 6, 5), (2, 130, 7), (1, 256, 64), (5, 384, 9)]


def make(rows, d, e, bits, group_size, zero, seed=0):
    g = torch.Generator().manual_seed(seed)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (e, d), generator=g, dtype=torch.int8)
    m = -(-d // group_size)
    return {
        "x": torch.randn(2, rows, d, generator=g),
        "codes": codes,
        "scale": torch.rand(e, m, generator=g) + 0.1,
        "zero": torch.randint(low // 2, high // 2, (e, m), generator=g).float() if zero else None,
        "bias": torch.randn(e, generator=g),
    }


def expected(c, group_size, act_scale):
    """The sum of the docstring, one product after the other, in float64."""
    x, q = c["x"].double().flatten(0, 1), c["codes"].double()
    if act_scale == "dynamic":
        s = (c["x"].flatten(0, 1).abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
        x = (c["x"].flatten(0, 1) / s).round().clamp(-128, 127).double() * s.double()
    elif act_scale is not None:
        x = (c["x"].flatten(0, 1) / act_scale).round().clamp(-128, 127).double() * float(act_scale)
    y = c["bias"].double().repeat(len(x), 1)
    for j in range(q.shape[1]):
        g = j // group_size
        offset = 0 if c["zero"] is None else c["zero"][:, g].double()
        y += x[:, j, None] * ((q[:, j] - offset) * c["scale"][:, g].double())
    return y.view(*c["x"].shape[:2], -1)


def slack(c, group_size, act_scale):
    """What fp32 sums, and 16-bit activations of the C kernel where they are not of 8 bits, may cost: (e)"""
    offset = 0 if c["zero"] is None else c["zero"].repeat_interleave(group_size, 1)[:, : c["codes"].shape[1]]
    sizes = ((c["codes"] - offset) * c["scale"].repeat_interleave(group_size, 1)[:, : c["codes"].shape[1]]).abs().sum(1)
    return c["x"].abs().max() * sizes * (2**-16 if act_scale is None else 1e-6) + 1e-6


def backends():
    return [name for name, b in OPERATORS["quantized_linear"].backends.items() if b.missing is None]


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("act_scale", [None, "dynamic", 0.03, torch.tensor(0.03)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, d, e", CASES)
def test_the_sum_of_the_docstring(rows, d, e, bits, act_scale, zero):
    for group_size in (d, 128, 4):
        c = make(rows, d, e, bits, group_size, zero)
        wanted = expected(c, group_size, act_scale)
        weight = pack_int4(c["codes"]) if bits == 4 else c["codes"]
        given = (c["x"], weight, c["scale"], c["zero"], c["bias"])
        options = {"bits": bits, "group_size": group_size, "act_scale": act_scale}
        for name in backends():
            why = quantized_linear.backends[name].objection(quantized_linear.Arguments(*given, **options))
            if why is None:
                with backend(name):
                    found = quantized_linear(*given, **options)
                assert ((found - wanted).abs() <= slack(c, group_size, act_scale if name == "c" else 1)).all(), name
                assert (found - wanted).norm() <= (
                    2e-6 if act_scale is not None or name != "c" else 4e-4
                ) * wanted.norm(), name


def test_packing_keeps_every_value():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 8) and packed[0, 0] == 0x10
    assert torch.equal(unpack_int4(packed), codes)


def test_gradients_reach_the_input():
    c = make(2, 16, 4, 8, 8, False)
    x = c["x"].requires_grad_()
    (plain,) = torch.autograd.grad(quantized_linear(x, c["codes"], c["scale"], bits=8, group_size=8).sum(), x)
    (rounded,) = torch.autograd.grad(
        quantized_linear(x, c["codes"], c["scale"], bits=8, group_size=8, act_scale="dynamic").sum(), x
    )
    W = c["codes"].float() * c["scale"].repeat_interleave(8, 1)
    torch.testing.assert_close(plain[0, 0], W.sum(0))
    torch.testing.assert_close(rounded, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_the_input(dtype):
    c = make(2, 16, 4, 8, 8, False)
    found = quantized_linear(c["x"].to(dtype), c["codes"], c["scale"], bits=8, group_size=8)
    wanted = quantized_linear(c["x"].to(dtype).double(), c["codes"], c["scale"], bits=8, group_size=8)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-1)


def test_it_says_what_is_wrong():
    c = make(2, 16, 4, 8, 8, False)
    x, w, s = c["x"], c["codes"], c["scale"]
    for change, words in [
        (dict(bits=3), "bits = 3"),
        (dict(bits=4), "wants uint8"),
        (dict(group_size=0), "group_size = 0"),
        (dict(group_size=4), r"scale has shape \(4, 2\), expected \(e=4, m=4\)"),
        (dict(act_scale="static"), "act_scale = 'static'"),
        (dict(act_scale=-1.0), "act_scale = -1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            quantized_linear(x, w, s, **({"bits": 8, "group_size": 8} | change))
    with pytest.raises(ValueError, match="expected \\(..., 16\\)"):
        quantized_linear(x[..., :3], w, s, bits=8, group_size=8)
    with pytest.raises(ValueError, match="odd"):
        pack_int4(w[:, :3])
