"""Mamba-3's scan and the complex scan: every backend is the recurrence, with carried state and documents."""

import functools

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, native
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.released.golden import relative_error


def arguments(r=1, l=7, dtype=torch.float64):
    torch.manual_seed(0)
    b, h, p, n = 2, 3, 4, 5
    v, D = torch.randn(b, l, h, p, dtype=dtype), torch.randn(h, dtype=dtype)
    k, q = torch.randn(2, b, l, r, h, n, dtype=dtype)
    a, gamma, beta = -torch.rand(b, l, h, dtype=dtype), *torch.rand(2, b, l, h, dtype=dtype)
    return [v, k, q, a, gamma, beta, D, torch.randn(h, r, p, dtype=dtype) if r > 1 else None]


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_torch_agrees_with_the_reference(r, documents, chunk_size):
    given = [None if t is None else t.requires_grad_() for t in arguments(r)]
    start = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0] * 7]) if documents else None
    wanted = [t for t in (*given, start) if t is not None]
    results, gradients = [], []
    for backend in ("reference", "torch"):
        with ops.backend(backend):
            y, S = ops.trapezoidal_scan(*given, start, seq_idx, chunk_size)
        results.append((y, S))
        gradients.append(torch.autograd.grad(y.sin().sum() + S.square().sum(), wanted))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_beta_zero_is_mamba_2():
    v, k, q, a, gamma, beta, D, _ = arguments()
    y, S = ops.trapezoidal_scan(v, k, q, a, gamma, torch.zeros_like(beta), D)
    expected, last = ops.ssd_scan(v * gamma[..., None], a, k[:, :, 0], q[:, :, 0])
    torch.testing.assert_close(y[:, :, 0], expected + v * D[:, None])
    torch.testing.assert_close(S, last)


def rotary(seed=0, b=2, l=37, h=4, p=5, g=2, n=6, m=3, start=True, packed=False, sliced=False, **extremes):
    """Arguments of `rotary_trapezoidal_scan` by name, fp32."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    whole = normal(b, l, h * p + 2 * g * n).split([h * p, g * n, g * n], dim=-1)
    v, k, q = (t if sliced else t.contiguous() for t in whole)
    call = {
        "v": v.unflatten(-1, (h, p)),
        "k": k.view(b, l, 1, g, n),
        "q": q.view(b, l, 1, g, n),
        "phase": 20 * normal(b, l, h, m),
        "k_bias": normal(h, 1, n),
        "q_bias": normal(h, 1, n),
        "a": -torch.rand(b, l, h, generator=rng),
        "gamma": torch.rand(b, l, h, generator=rng),
        "beta": torch.rand(b, l, h, generator=rng),
        "D": normal(h),
        "initial_state": normal(b, h, p, n) if start else None,
        "seq_idx": checks.packed(b, l, rng) if packed else None,
    }
    return call | extremes


def plain(**sizes):
    """Arguments of `trapezoidal_scan`."""
    call = rotary(g=sizes.get("h", 4), **sizes)
    return {name: t for name, t in call.items() if name not in ("phase", "k_bias", "q_bias")}


ROTARY = functools.partial(checks.assert_close, ops.rotary_trapezoidal_scan)
PLAIN = functools.partial(checks.assert_close, ops.trapezoidal_scan)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@drawn(data=st.data())
def test_turned_on_the_way_against_the_reference(backend, data):
    draw = data.draw
    g, n = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([1, 4, 7, 16, 33, 64]))
    sizes = {
        "seed": draw(st.integers(0, 999)),
        "b": draw(st.sampled_from([1, 3])),
        "h": g * draw(st.sampled_from([1, 2, 5])),
        "l": draw(st.sampled_from([1, 2, 63, 64, 65, 130])),
        "p": draw(st.sampled_from([1, 3, 16, 17, 70])),
        "n": n,
        "start": draw(st.booleans()),
        "packed": draw(st.booleans()),
        "sliced": draw(st.booleans()),
    }
    if draw(st.integers(0, 3)):
        ROTARY(rotary(g=g, m=draw(st.sampled_from([0, n // 4, n // 2])), **sizes), backend)
    else:
        PLAIN(plain(**sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [0.0, -1e-8, -40.0])
def test_extreme_decays(backend, rate):
    call = rotary(l=150)
    call["a"] = rate * torch.where(torch.arange(150)[:, None] % 9 == 0, 0.1, 1.0).expand(2, 150, 4)
    ROTARY(call, backend)
    ROTARY(rotary(l=150, a=torch.where(torch.arange(150)[:, None] % 64 < 32, -30.0, -0.01).expand(2, 150, 4)), backend)


@native
def test_phases_of_any_size():
    big = torch.linspace(-8000, 8000, 2 * 37 * 4 * 3).view(2, 37, 4, 3)
    ROTARY(rotary(phase=big), "c")
    ROTARY(rotary(phase=big * 1000), "c")


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_read(backend):
    call = {k: t.bfloat16() if k in ("v", "k", "q") else t for k, t in rotary().items()}
    (y, state), grads = checks.run(ops.rotary_trapezoidal_scan, backend, call)
    (exact, last), _ = checks.run(ops.rotary_trapezoidal_scan, "reference", call, torch.float64)
    assert relative_error(y, exact) < checks.OUT and relative_error(state, last) < checks.OUT
    assert y.dtype == state.dtype == torch.float32 and grads[0].dtype == torch.bfloat16


@native
def test_poisoned_memory_is_written_over(monkeypatch):
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    for sizes in ({"l": 70, "p": 17, "packed": True}, {"l": 1, "n": 40, "p": 1, "m": 20}):
        ROTARY(rotary(**sizes), "c")
        PLAIN(plain(**sizes), "c")


@native
def test_documents_do_not_see_each_other():
    call = {k: t if t is None else t.requires_grad_() for k, t in rotary(b=1, l=100, start=False).items()}
    call["seq_idx"] = torch.tensor([[3] * 40 + [1] * 60])
    with ops.backend("c"):
        y, _ = ops.rotary_trapezoidal_scan(**call)
    leaves = [call[k] for k in ("v", "k", "q", "phase", "a", "gamma", "beta")]
    for part, other in ((slice(40, None), slice(None, 40)), (slice(None, 40), slice(40, None))):
        for grad in torch.autograd.grad(y[:, part].square().sum(), leaves, retain_graph=True):
            assert grad[:, other].abs().max() == 0


@native
def test_torch_sees_a_proper_operator():
    call = {k: t if t is None else t.requires_grad_() for k, t in rotary(b=1, l=20, h=2, g=1, n=4, m=2).items()}
    one = {k: t[:, :, 0] if k in ("k", "q") else t[:, 0] if k.endswith("bias") else t for k, t in call.items()}
    names = "v k q a gamma beta D phase k_bias q_bias initial_state seq_idx".split()
    args = [t if t is None else t.detach().clone().requires_grad_() for t in (one[name] for name in names)]
    torch.library.opcheck(torch.ops.ssmzoo.trapezoidal_scan.default, (*args, True, "c"))

    def function(v):
        return ops.rotary_trapezoidal_scan(**call | {"v": v})[0]

    with ops.backend("c"):
        expected = function(call["v"])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(call["v"])
        torch.testing.assert_close(compiled, expected)
        grad = torch.autograd.grad(function(call["v"]).sum(), call["v"], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no double backward"):
            grad.sum().backward()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda v, k, *rest: ops.trapezoidal_scan(v, k[:, :, :, :2], *rest), r"k has shape .*expected .*h=3"),
        (lambda v, k, *rest: ops.trapezoidal_scan(v, k.repeat(1, 1, 2, 1, 1), *rest), r"expected \(b=2, l=7, r=1"),
        (lambda v, *rest: ops.trapezoidal_scan(v, *rest, chunk_size=0), "chunk_size = 0"),
        (lambda *_: ops.rotary_trapezoidal_scan(**rotary(m=4)), "phase has 4 angles, .* two of the 6 channels"),
        (lambda *_: ops.rotary_trapezoidal_scan(**rotary(g=3)), "k has 3 groups, which do not divide the 4 heads"),
        (lambda *_: ops.rotary_trapezoidal_scan(**rotary(k_bias=torch.zeros(4, 6))), "k_bias has shape"),
        (lambda v, *rest: ops.complex_scan(v[0], v[0]), "a has dtype torch.float64, expected complex64"),
        (lambda v, *rest: ops.router_logits(v, v[0, 0]), r"expected \(... d\) and \(d e\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments())
