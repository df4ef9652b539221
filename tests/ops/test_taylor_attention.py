"""Taylor linear attention on every backend against the float64 reference, and against all pairs of positions."""

import functools

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, GRAD, OUT, native, rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.ops.taylor_attention import features, n_features, quadratic
from ssmzoo.released.golden import relative_error


def inputs(seed=0, b=2, l=37, h=3, f=4, p=5, state=True, masked=False, packed=False, scale=1.0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(shape, generator=rng)

    call = {"q": normal(b, l, h, f), "k": normal(b, l, h, f), "v": normal(b, l, h, p)}
    call = {name: t.to(dtype) for name, t in call.items()}
    if state:
        call["state"] = ops.taylor_state(normal(b, 3, h, f), normal(b, 3, h, p))
    mask = torch.rand(b, l, generator=rng) < 0.7 if masked else None
    seq_idx = checks.packed(b, l, rng) if packed else None
    return call | {"mask": mask, "seq_idx": seq_idx, "eps": 1e-3 if masked else 1e-12}  # a row may see no key at all


run = functools.partial(checks.run, ops.taylor_attention)


def assert_close(call, backend, out=OUT, grad=GRAD):
    got, expected = run(backend, call), run("reference", call, torch.float64)
    errors = [relative_error(x, y) for x, y in zip(got[0], expected[0])]
    assert max(errors) < out, errors
    total = sum(y.norm() ** 2 for y in expected[1]) ** 0.5  # a lone key has weight 1 whatever the scores
    errors = [((x.double() - y).norm() / (y.norm() + 1e-2 * total + 1e-6)).item() for x, y in zip(got[1], expected[1])]
    assert max(errors, default=0) < grad, errors


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_reference(backend, data):
    draw = data.draw
    sizes = {
        "b": draw(st.sampled_from([1, 2, 3])),
        "l": draw(st.sampled_from([1, 2, 15, 63, 64, 65, 130])),
        "h": draw(st.sampled_from([1, 2])),
        "f": draw(st.sampled_from([1, 3, 8, 16, 17])),
        "p": draw(st.sampled_from([1, 5, 16, 31, 64])),
    }
    flags = {name: draw(st.booleans()) for name in ("state", "masked", "packed")}
    assert_close(inputs(draw(st.integers(0, 999)), **sizes, **flags), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-4, 10.0])
def test_extreme_scores(backend, scale):
    assert_close(inputs(l=150, scale=scale, state=False), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"b": 0}, {"l": 0}])
def test_nothing_to_do(backend, sizes):
    call = inputs(**sizes)
    y, last = run(backend, call)[0]
    assert y.shape == call["v"].shape and torch.equal(last, call["state"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    call = inputs(dtype=dtype)
    (y, state), _ = run(backend, call)
    assert y.dtype == dtype and state.dtype == torch.float32
    assert_close(call, backend, rounding(dtype), rounding(dtype, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_layouts(backend):
    call = inputs()
    strided = dict(call)
    for name in "qkv":
        strided[name] = call[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat([call["q"], call["k"]], dim=-1)
    strided["q"], strided["k"] = wide.chunk(2, dim=-1)
    for x, y in zip(run(backend, strided), run(backend, call)):
        assert all(torch.equal(a, b) for a, b in zip(x, y))


def test_it_is_attention_with_the_taylor_series_of_exp():
    call = inputs(state=False, l=21)
    y, _ = ops.taylor_attention(**call)
    assert relative_error(y, quadratic(call["q"], call["k"], call["v"])) < 1e-6
    x, z = torch.randn(2, 7, 6, dtype=torch.float64)
    s = (x * z).sum(-1) * 6**-0.5
    assert features(x).shape[-1] == n_features(6) == 28
    assert torch.allclose((features(x) * features(z)).sum(-1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_is_a_state_to_begin_with(backend):
    """Every position sees all keys of the prefix, of which a mask leaves some out."""
    call = inputs(state=False, l=9)
    k, v = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 5)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    with ops.backend(backend):
        y, _ = ops.taylor_attention(**call | {"state": ops.taylor_state(k, v, mask=keep)})
    s = torch.einsum("blhf,bmhf->bhlm", call["q"], torch.cat([k, call["k"]], dim=1)) / 2
    seen = torch.cat([keep[:, None].expand(-1, 9, -1), torch.ones(2, 9, 9, dtype=torch.bool).tril()], dim=-1)
    w = (1 + s + s**2 / 2) * seen[:, None]
    expected = torch.einsum("bhlm,bmhp->blhp", w / w.sum(-1, keepdim=True), torch.cat([v, call["v"]], dim=1))
    assert relative_error(y, expected) < 1e-5


@native
def test_memory_is_linear_in_the_length():
    """What autograd keeps of a call: twice as much for twice the length, where all pairs need four times."""

    def kept(l):
        call = inputs(b=1, h=1, l=l, f=8, p=16, state=False)
        call["q"].requires_grad_()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            ops.taylor_attention(**call)
        return sum(sizes)

    assert kept(2048) == pytest.approx(2 * kept(1024), rel=0.01)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 37, 3, 5)}, r"k has shape \(2, 37, 3, 5\), expected \(b=2, l=37, h=3, f=4\)"),
        (
            {"state": torch.zeros(2, 3, 16, 6)},
            r"state has shape .* expected \(b=2, h=3, \(f\+1\)\(f\+2\)/2=15, p\+1=6\)",
        ),
        ({"mask": torch.ones(2, 37)}, r"mask is torch.float32 on cpu, expected torch.bool"),
        ({"mask": torch.ones(2, 36, dtype=torch.bool)}, "mask has shape"),
        ({"seq_idx": torch.zeros(2, 37)}, "seq_idx has dtype torch.float32"),
        ({"eps": -1.0}, "eps = -1.0, expected"),
        ({"q": torch.zeros(2, 37, 3, 0), "k": torch.zeros(2, 37, 3, 0)}, "q has no channels"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.taylor_attention(**inputs() | change)
