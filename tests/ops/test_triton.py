"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the float64 reference: tiles and chunks at
sizes that an interpreter can do.

The interpreter must be asked for before anything imports the kernels: one test runs this file in a process of its own.
"""

import functools

import against_reference as checks
import pytest
import torch
from interpreted import interpret, interpreted, outside, set_sizes

from ssmzoo import ops
from ssmzoo.ops.triton import MISSING

if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)


@outside
def test_all_of_this_file_through_the_interpreter():
    interpret(__file__)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and chunks at sizes that an interpreter can do."""
    from ssmzoo.ops.causal_conv1d import triton as causal_conv1d
    from ssmzoo.ops.complex_scan import triton as complex_scan
    from ssmzoo.ops.gated_delta_rule import triton as gated_delta_rule
    from ssmzoo.ops.gated_linear_recurrence import triton as gated_linear_recurrence
    from ssmzoo.ops.selective_scan import triton as selective_scan
    from ssmzoo.ops.ssd import triton as ssd
    from ssmzoo.ops.taylor_attention import triton as taylor_attention

    set_sizes(
        monkeypatch,
        (selective_scan, dict(CHANNELS=2, STEPS=8)),
        (causal_conv1d, dict(TILE=32, SHORT=4)),
        (ssd, dict(STRETCH=32, CHUNK=16, STATE_SIZE=256)),
        (gated_delta_rule, dict(STRETCH=4, GROUP=2, STATE_SIZE=(16, 16))),
        (gated_linear_recurrence, dict(STEPS=4, CHANNELS=4)),
        (complex_scan, dict(STEPS=4, CHANNELS=4)),
        (taylor_attention, dict(STRETCH=32, CHUNK=(16, 16), COLUMNS=16)),
    )


assert_close = functools.partial(checks.assert_close, backend="triton")


def packed(b, l):
    return (torch.rand(b, l) < 0.2).cumsum(1)


def padded(b, l):
    return packed(b, l).masked_fill(torch.rand(b, l) < 0.3, -1)


def scan_call(b=1, e=3, l=6, n=2, g=1, B="", C="", options="", channels_last=False, packs=False, dtype=torch.float32):
    def sequence():
        return torch.randn(b, l, e).transpose(1, 2) if channels_last else torch.randn(b, e, l)

    def coefficient(kind):
        if kind == "constant":
            return torch.randn(e, n)
        return torch.randn(b, g, n, l) if g > 1 else torch.randn(b, l, n).transpose(1, 2)

    call = dict(u=sequence(), delta=sequence() - 1, A=-3 * torch.rand(e, n), B=coefficient(B), C=coefficient(C))
    extra = dict(D=torch.randn(e), z=sequence(), delta_bias=torch.rand(e), initial_state=torch.randn(b, e, n))
    call |= {name: extra[name] for name in options.split()}
    call = {name: t.to(dtype) if name in ("u", "delta", "B", "C", "z") else t for name, t in call.items()}
    return call | dict(delta_softplus=True, return_last_state=True, seq_idx=packed(b, l) if packs else None)


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(b=2, e=6, l=9, g=2, options="D z delta_bias initial_state", packs=True),
        dict(e=3, l=5, channels_last=True, options="D z initial_state"),
        dict(e=3, l=5, B="constant", options="delta_bias", packs=True),
        dict(e=2, l=5, n=3, B="constant", C="constant", options="z initial_state"),
        dict(e=1, l=1, n=1, options="initial_state"),
    ],
    ids=str,
)
def test_scan_against_reference(case):
    assert_close(ops.selective_scan_fn, scan_call(**case))


@interpreted
@pytest.mark.parametrize(
    "programs, shortest, case",
    [
        (9, 1, dict(l=22, options="D z delta_bias initial_state")),
        (4, 2, dict(e=4, l=30, g=2, options="z initial_state", packs=True)),
        (99, 1, dict(e=2, l=11, B="constant", C="constant", packs=True)),
    ],
    ids=str,
)
def test_long_scans_are_cut_into_segments(monkeypatch, programs, shortest, case):
    from ssmzoo.ops.selective_scan import triton as launcher

    monkeypatch.setattr(launcher, "ENOUGH", programs)
    monkeypatch.setattr(launcher, "SHORTEST", shortest)
    found = []
    launch = launcher.Launch.enter
    monkeypatch.setattr(launcher.Launch, "enter", lambda self, *a: (found.append(self.segments), launch(self, *a))[1])
    call = scan_call(**case)
    assert_close(ops.selective_scan_fn, call)
    with ops.backend("triton"):  # keeps no states
        out, last = ops.selective_scan_fn(**call)
    with ops.backend("torch"):
        torch.testing.assert_close((out, last), ops.selective_scan_fn(**call))
    assert min(found) > 1


@interpreted
@pytest.mark.parametrize("sizes", [dict(b=0), dict(l=0), dict(e=0)], ids=str)
def test_scan_of_nothing(sizes):
    call = scan_call(options="initial_state", **sizes)
    got, grads = checks.run(ops.selective_scan_fn, "triton", call)
    assert [t.shape for t in got] == [call["u"].shape, call["initial_state"].shape]
    assert all(g.isfinite().all() for g in grads)
    assert sizes != {"l": 0} or torch.equal(got[1], call["initial_state"])


@interpreted
@pytest.mark.parametrize("delta, A", [(1e-8, -1.0), (50.0, -1e4), (1.0, -1e30), (0.1, 0.0)])
def test_scan_at_extreme_rates(delta, A):
    call = scan_call(e=2, l=5) | dict(delta_softplus=False)
    call["delta"] = delta * (0.5 + torch.rand_like(call["delta"]))
    call["A"] = A * (0.5 + torch.rand_like(call["A"]))
    assert_close(ops.selective_scan_fn, call)


@interpreted
def test_softplus_of_very_negative_steps():
    call = scan_call(e=2, l=4) | dict(delta=torch.linspace(-25, 25, 8).view(1, 2, 4))
    assert_close(ops.selective_scan_fn, call)


@interpreted
def test_runs_repeat_bit_by_bit_and_sequences_may_be_split():
    call = scan_call(e=2, l=7, options="D z")
    first, second = (checks.run(ops.selective_scan_fn, "triton", call) for _ in range(2))
    assert all(torch.equal(x, y) for xs, ys in zip(first, second) for x, y in zip(xs, ys))
    state, parts = None, []
    with ops.backend("triton"):
        for span in (slice(0, 3), slice(3, 7)):
            cut = call | {k: call[k][..., span] for k in ("u", "delta", "B", "C", "z")}
            out, state = ops.selective_scan_fn(**cut, initial_state=state)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), first[0][0])
    torch.testing.assert_close(state, first[0][1])


@interpreted
@pytest.mark.parametrize(
    "b, c, l, k, channels_last, packs, first, bias, activation",
    [
        (2, 5, 9, 4, False, False, True, True, "silu"),
        (2, 5, 9, 3, True, True, True, True, "silu"),
        (1, 2, 2, 5, False, True, True, False, None),  # shorter than the taps
        (1, 3, 4, 1, True, False, False, True, "swish"),
    ],
)
def test_convolution_against_reference(b, c, l, k, channels_last, packs, first, bias, activation):
    x = torch.randn(b, l, c).transpose(1, 2) if channels_last else torch.randn(b, c, l)
    assert_close(
        ops.causal_conv1d_fn,
        dict(
            x=x,
            weight=torch.randn(c, k),
            bias=torch.randn(c) if bias else None,
            seq_idx=padded(b, l) if packs else None,
            initial_states=torch.randn(b, c, k - 1) if first else None,
            return_final_states=True,
            activation=activation,
        ),
    )


@interpreted
@pytest.mark.parametrize(
    "b, l, h, p, g, n, options, packs, scale",
    [
        (1, 5, 1, 3, 1, 2, "", False, 1),
        (1, 37, 4, 20, 2, 5, "D z dt_bias initial_states", True, 1),
        (1, 20, 2, 16, 1, 17, "initial_states", False, 1),
        (1, 33, 1, 8, 1, 4, "D", True, 1e4),
    ],
)
def test_ssd_against_reference(b, l, h, p, g, n, options, packs, scale):
    call = dict(
        x=torch.randn(b, l, h, p),
        dt=torch.randn(b, l, h),
        A=-scale * torch.rand(h),
        B=torch.randn(b, l, g, n),
        C=torch.randn(b, l, g, n),
    )
    extra = dict(
        D=torch.randn(h, p), z=torch.randn(b, l, h, p), dt_bias=torch.randn(h), initial_states=torch.randn(b, h, p, n)
    )
    call |= {name: extra[name] for name in options.split()}
    assert_close(
        ops.mamba_chunk_scan_combined,
        call | dict(seq_idx=packed(b, l) if packs else None, dt_softplus=True, return_final_states=True),
    )


@interpreted
@pytest.mark.parametrize(
    "r, l, h, p, n, more, scale",
    [(1, 35, 2, 5, 3, True, 1), (3, 9, 1, 17, 17, True, 1), (2, 5, 1, 3, 2, False, 100), (1, 1, 1, 1, 1, False, 1)],
)
def test_trapezoidal_scan_against_reference(r, l, h, p, n, more, scale):
    b = 1
    call = dict(v=torch.randn(b, l, h, p), k=torch.randn(b, l, r, h, n), q=torch.randn(b, l, r, h, n))
    call |= dict(a=-scale * torch.rand(b, l, h), gamma=torch.rand(b, l, h), beta=torch.rand(b, l, h), D=torch.randn(h))
    call |= dict(mimo=torch.randn(h, r, p)) if r > 1 else {}
    call |= dict(initial_state=torch.randn(b, h, p, n), seq_idx=packed(b, l)) if more else {}
    assert_close(ops.trapezoidal_scan, call)


@interpreted
@pytest.mark.parametrize(
    "b, l, h, n, p, channels, more, scale",
    [
        (1, 7, 2, 3, 5, True, True, 1),
        (2, 6, 1, 5, 2, False, True, 1),
        (1, 5, 1, 4, 9, False, False, 30),
        (1, 1, 1, 1, 1, True, False, 1),
    ],
)
def test_gated_delta_rule_against_reference(b, l, h, n, p, channels, more, scale):
    call = dict(q=torch.randn(b, l, h, n), v=torch.randn(b, l, h, p), beta=2 * torch.rand(b, l, h))
    call["k"] = torch.nn.functional.normalize(torch.randn(b, l, h, n), dim=-1)
    call["g"] = -scale * torch.rand(*(b, l, h), *[n] * channels)
    call |= dict(initial_state=torch.randn(b, h, n, p), seq_idx=packed(b, l)) if more else {}
    assert_close(ops.gated_delta_rule, call)


@interpreted
@pytest.mark.parametrize(
    "l, h, f, p, more", [(35, 1, 5, 17, True), (5, 2, 3, 3, True), (3, 1, 16, 2, False), (2, 1, 1, 1, False)]
)
def test_taylor_attention_against_reference(l, h, f, p, more):
    call = dict(q=torch.randn(1, l, h, f), k=torch.randn(1, l, h, f), v=torch.randn(1, l, h, p))
    if more:
        past = torch.randn(1, 3, h, f), torch.randn(1, 3, h, p)
        call |= dict(state=ops.taylor_state(*past), mask=torch.rand(1, l) < 0.7, seq_idx=packed(1, l), eps=1e-3)
    assert_close(ops.taylor_attention, call)


@interpreted
@pytest.mark.parametrize(
    "b, l, n, first, reverse", [(2, 9, 5, True, False), (1, 8, 3, True, True), (1, 1, 1, False, True)]
)
def test_gated_linear_recurrence_against_reference(b, l, n, first, reverse):
    call = dict(a=torch.rand(b, l, n), x=torch.randn(b, l, n), reverse=reverse)
    assert_close(ops.gated_linear_recurrence, call | (dict(initial_state=torch.randn(b, n)) if first else {}))


def _of_pairs(a, b, initial_state=None):
    """complex_scan of (... 2) tensors."""
    call = (None if t is None else torch.complex(*t.unbind(-1)) for t in (a, b, initial_state))
    return torch.view_as_real(ops.complex_scan(*call))


@interpreted
@pytest.mark.parametrize("b, l, n, first", [(2, 9, 5, True), (1, 8, 3, False), (1, 1, 1, True), (3, 4, 4, False)])
def test_complex_scan_against_reference(b, l, n, first):
    a = torch.randn(b, l, n, 2)
    call = dict(a=a / a.norm(dim=-1, keepdim=True), b=torch.randn(b, l, n, 2))
    assert_close(_of_pairs, call | (dict(initial_state=torch.randn(b, n, 2)) if first else {}))


@interpreted
def test_complex_scan_of_conjugates_and_other_layouts_and_what_torch_serves():
    a, b = (torch.randn(3, 2, 9, dtype=torch.complex64, requires_grad=True) for _ in range(2))
    h0 = torch.randn(2, dtype=torch.complex64, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        with ops.backend(backend):
            h = ops.complex_scan(0.4 * a.mT.conj(), b.mT, h0.expand(3, 2))
            (first,) = torch.autograd.grad(h.abs().square().sum(), a, create_graph=True)
            found.append((h, *torch.autograd.grad(first.abs().square().sum(), (a, b, h0))))  # a gradient of a gradient
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    double = torch.ones(1, 2, 1, dtype=torch.complex128)
    assert ops.chosen_backend(ops.complex_scan, double, double) == "torch"
    assert ops.chosen_backend(ops.complex_scan, double[:, :0].cfloat(), double[:, :0].cfloat()) == "torch"


@interpreted
def test_compiles_in_one_graph_and_refuses_what_it_cannot():
    call = scan_call(e=2, l=4)
    with ops.backend("triton"):
        compiled = torch.compile(
            lambda u: ops.selective_scan_fn(**call | dict(u=u))[0], fullgraph=True, backend="aot_eager"
        )
        u = call["u"].requires_grad_()
        torch.testing.assert_close(compiled(u), ops.selective_scan_fn(**call)[0])
        compiled(u).sum().backward()
        with pytest.raises(ops.BackendError, match="got float64"):
            ops.causal_conv1d_fn(u.double(), torch.ones(2, 3))
        x = torch.randn(1, 2, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(ops.causal_conv1d_fn(x, torch.ones(2, 3)).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            gradient.sum().backward()
