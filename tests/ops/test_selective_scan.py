"""selective_scan on every backend against the float64 reference, at awkward sizes and values."""

import functools
import gc
import resource
import threading

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, native
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.ops.selective_scan import SCAN
from ssmzoo.released.golden import relative_error


def inputs(
    seed=0,
    b=2,
    e=20,
    l=37,
    n=4,
    g=1,
    B="last",
    C="last",
    channels_last=False,
    optional="D z delta_bias",
    packed=False,
    softplus=True,
    dtype=torch.float32,
):
    """Arguments of selective_scan_fn; B, C "constant" (e n), "first" (b g n l) or "last" (b l g n) in memory."""
    rng = torch.Generator().manual_seed(seed)

    def sequence():
        if channels_last:
            return torch.randn(b, l, e, generator=rng).transpose(1, 2)
        return torch.randn(b, e, l, generator=rng)

    def coefficient(kind):
        if kind == "constant":
            return torch.randn(e, n, generator=rng)
        value = torch.randn(b, l, g, n, generator=rng).permute(0, 2, 3, 1)
        value = value if kind == "last" else value.contiguous()
        return value[:, 0] if g == 1 else value

    delta = sequence() - 2 if softplus else sequence().abs() * 0.2
    call = {
        "u": sequence(),
        "delta": delta,
        "A": -3 * torch.rand(e, n, generator=rng),
        "B": coefficient(B),
        "C": coefficient(C),
    }
    extra = {
        "D": torch.randn(e, generator=rng),
        "z": sequence(),
        "delta_bias": torch.rand(e, generator=rng),
        "initial_state": torch.randn(b, e, n, generator=rng),
    }
    call |= {name: extra[name] for name in optional.split()}
    call = {
        name: t.to(dtype if name in "u delta B C z" else torch.promote_types(dtype, torch.float32)).requires_grad_()
        for name, t in call.items()
    }
    return call | {"delta_softplus": softplus, "seq_idx": checks.packed(b, l, rng, 0.1) if packed else None}


SCAN_WITH_STATE = functools.partial(ops.selective_scan_fn, return_last_state=True)
run = functools.partial(checks.run, SCAN_WITH_STATE)
assert_close = functools.partial(checks.assert_close, SCAN_WITH_STATE)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_reference(backend, data):
    draw = data.draw
    g, kinds = draw(st.sampled_from([1, 1, 2, 3])), st.sampled_from(["constant", "first", "last"])
    assert_close(
        inputs(
            seed=draw(st.integers(0, 999)),
            b=draw(st.sampled_from([1, 2, 3])),
            e=g * draw(st.sampled_from([1, 3, 5, 16, 17, 40])),
            l=draw(st.sampled_from([1, 2, 31, 32, 33, 65, 100])),
            n=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16, 17, 33])),
            g=g,
            B=draw(kinds),
            C=draw(kinds),
            channels_last=draw(st.booleans()),
            softplus=draw(st.booleans()),
            optional=" ".join(k for k in ("D", "z", "delta_bias", "initial_state") if draw(st.booleans())),
            packed=draw(st.booleans()),
        ),
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes", [dict(l=5000, e=3, b=1), dict(n=256, l=70, e=5), dict(e=700, l=9, b=1), dict(e=1, n=1, l=1, b=1)]
)
def test_extreme_sizes(backend, sizes):
    assert_close(inputs(optional="D z delta_bias initial_state", **sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [dict(b=0), dict(l=0), dict(e=0)])
def test_nothing_to_do(backend, sizes):
    call = inputs(optional="initial_state", **sizes)
    got, grads = run(backend, call)
    assert [t.shape for t in got] == [call["u"].shape, call["initial_state"].shape]
    assert torch.equal(got[1], call["initial_state"]) or sizes != {"l": 0}
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "delta, A", [(1e-8, -1.0), (50.0, -1.0), (50.0, -1e4), (1.0, -1e30), (0.1, -1e-12), (0.1, 0.0), (0.0, -1.0)]
)
def test_extreme_rates(backend, delta, A):
    call = inputs(l=50, softplus=False, optional="")
    with torch.no_grad():
        call["delta"].copy_(delta * (0.5 + torch.rand_like(call["delta"])))
        call["A"].copy_(A * (0.5 + torch.rand_like(call["A"])))
    assert_close(call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broadcast_and_sliced_inputs(backend):
    call = inputs(e=24, l=40)
    rng = torch.Generator().manual_seed(9)
    wide = torch.randn(2, 80, 48, generator=rng)
    call["u"] = wide[:, ::2, 5:29].transpose(1, 2)  # every second step, some channels
    call["delta"] = torch.randn(2, 1, 40, generator=rng).expand(-1, 24, -1)
    call["A"] = -torch.rand(1, 4, generator=rng).expand(24, -1)
    call["B"] = torch.randn(1, 4, 40, generator=rng).expand(2, -1, -1)
    assert_close(call, backend)
    with ops.backend(backend):  # a gradient that is itself broadcast
        u = call["u"].clone().requires_grad_()
        ops.selective_scan_fn(**call | {"u": u}).sum().backward()
    assert u.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(backend, dtype):
    """Half-precision inputs are computed in float32: the result is the exact one, rounded."""
    call = inputs(dtype=dtype, g=2, e=20, optional="D z delta_bias initial_state")
    (out, state), _ = checks.assert_rounds_once(SCAN_WITH_STATE, call, backend)
    assert out.dtype == dtype and state.dtype == torch.float32


@pytest.mark.parametrize("kinds", [("last", "last"), ("constant", "first")])
def test_gradcheck(kinds):
    call = inputs(
        b=1,
        e=4,
        l=19,
        n=2,
        g=2,
        B=kinds[0],
        C=kinds[1],
        packed=True,
        dtype=torch.float64,
        optional="D z delta_bias initial_state",
    )
    names = [k for k, v in call.items() if torch.is_tensor(v) and v.requires_grad]
    with ops.backend("torch"):
        assert torch.autograd.gradcheck(
            lambda *leaves: ops.selective_scan_fn(**call | dict(zip(names, leaves)), return_last_state=True),
            [call[k] for k in names],
            fast_mode=True,
        )


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_any_split_with_the_state_carried_gives_the_same(backend):
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(l=70).items()}
    with ops.backend(backend):
        whole, last = ops.selective_scan_fn(**call, return_last_state=True)
        for cut in (1, 31, 32, 33, 69):
            state, parts = None, []
            for span in (slice(0, cut), slice(cut, None)):
                part = call | {k: call[k][..., span] for k in ("u", "delta", "B", "C", "z")}
                y, state = ops.selective_scan_fn(**part, return_last_state=True, initial_state=state)
                parts.append(y)
            assert relative_error(torch.cat(parts, 2), whole) < 1e-6 and relative_error(state, last) < 1e-6


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_documents_do_not_see_each_other(backend):
    call = inputs(b=1, l=50, optional="initial_state")
    call["seq_idx"] = torch.tensor([[3] * 35 + [7] * 15])
    with torch.no_grad():
        call["u"][..., 3] = float("inf")  # the first document is broken, the second must not notice
    with ops.backend(backend):
        out = ops.selective_scan_fn(**call)[..., 35:]
        alone = {k: call[k][..., 35:] for k in ("u", "delta", "B", "C")}
        assert relative_error(out, ops.selective_scan_fn(**alone, A=call["A"], delta_softplus=True)) < 1e-6
        call["u"] = torch.randn_like(call["u"], requires_grad=True)
        out = ops.selective_scan_fn(**call)[..., 35:].sum()
    du, dstate = torch.autograd.grad(out, (call["u"], call["initial_state"]))
    assert (du[..., :35] == 0).all() and (dstate == 0).all() and (du[..., 35:] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_are_passed_on(backend):
    for bad in (float("nan"), float("inf"), -float("inf")):
        call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(b=1, e=18, l=40, optional="D").items()}
        call["u"][0, 3, 20] = bad
        with ops.backend(backend):
            out = ops.selective_scan_fn(**call)
        expected = ops.selective_scan_fn.reference(**call)
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
        assert out[0, :3].isfinite().all() and out[0, 3, :20].isfinite().all() and not out[0, 3, 20].isfinite()


@native
def test_repeats_are_identical_also_from_many_threads():
    call = inputs(b=3, e=100, l=150, n=16, optional="D z delta_bias initial_state")
    first = run("c", call)
    results = []
    with ops.backend("c"):

        def work():
            results.extend(run("c", call) for _ in range(4))

        threads = [threading.Thread(target=work) for _ in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(results) == 24
    for again in results:
        assert all(torch.equal(x, y) for a, b in zip(first, again) for x, y in zip(a, b))


@native
def test_many_calls_leave_nothing_behind():
    call = inputs(b=1, e=64, l=64, n=16, optional="D z")
    leaves = [v for v in call.values() if torch.is_tensor(v)]

    def calls(count):
        for _ in range(count):
            torch.autograd.grad(ops.selective_scan_fn(**call).sum(), leaves)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    before = calls(300)
    assert calls(2000) - before < 20_000


@native
def test_poisoned_memory_is_written_over(monkeypatch):
    """torch.empty hands out NaNs: a result that is not written everywhere shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            t = make(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    for backend in ("c", "torch"):
        for kinds in (("last", "last"), ("constant", "first")):
            assert_close(
                inputs(
                    e=21, g=3, l=35, n=5, B=kinds[0], C=kinds[1], packed=True, optional="D z delta_bias initial_state"
                ),
                backend,
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_sees_a_proper_operator(backend):
    """Schema, fake kernel, autograd registration, compile, export, autocast, checkpointing, meta tensors."""
    call = inputs(b=1, e=8, l=20, n=4, g=2, optional="D z delta_bias initial_state")
    args = SCAN.Inputs(**{name: call[name] for name in SCAN.Inputs._fields} | {"delta_softplus": True, "seq_idx": None})
    torch.library.opcheck(torch.ops.ssmzoo.selective_scan.default, (*args, True, backend))

    def function(u):
        return ops.selective_scan_fn(**call | {"u": u, "seq_idx": None})

    with ops.backend(backend):
        expected = function(call["u"])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(call["u"])
        torch.testing.assert_close(compiled, expected)
        compiled.sum().backward()
        again = torch.utils.checkpoint.checkpoint(function, call["u"], use_reentrant=False)
        assert torch.equal(torch.autograd.grad(again.sum(), call["u"])[0], call["u"].grad)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(call["u"]), expected)
        with torch.device("meta"):
            meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in call.items()}
        if backend == "torch":
            assert ops.selective_scan_fn(**meta).shape == expected.shape

        class Module(torch.nn.Module):
            def forward(self, u):
                with torch.no_grad():
                    return function(u)

        exported = torch.export.export(Module(), (call["u"].detach(),))
        torch.testing.assert_close(exported.module()(call["u"].detach()), expected)
        grad = torch.autograd.grad(function(call["u"]).sum(), call["u"], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no double backward"):
            grad.sum().backward()


def test_complex_A_is_left_to_the_reference():
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(b=1, e=3, l=6, n=2, optional="").items()}
    call["A"] = torch.complex(call["A"], torch.randn(3, 2))
    call["B"], call["C"] = torch.randn(1, 2, 12), torch.randn(1, 2, 12)  # real and imaginary parts interleaved
    assert ops.chosen_backend(ops.selective_scan_fn, **call) == "reference"
    y, h = ops.selective_scan_fn(**call, return_last_state=True)
    assert h.is_complex() and y.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("heads", [None, 4])
def test_steps_equal_the_whole(backend, heads):
    e, n, g = 20, 18, 2
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(e=e, n=n, g=g, l=6).items()}
    whole, last = ops.selective_scan_fn(**call, return_last_state=True)
    state = torch.zeros(2, e, n)

    def shaped(t):  # (b e ..) -> (b h p ..)
        return t if heads is None else t.unflatten(t.shape.index(e), (heads, -1))

    state = shaped(state)
    steps = []
    with ops.backend(backend):
        for t in range(6):
            at = {k: call[k][..., t] for k in ("u", "delta", "B", "C", "z")}
            steps.append(
                ops.selective_state_update(
                    state,
                    *map(shaped, (at["u"], at["delta"], call["A"])),
                    at["B"].contiguous(),
                    at["C"].contiguous(),
                    *map(shaped, (call["D"], at["z"], call["delta_bias"])),
                    dt_softplus=True,
                ).reshape(2, e)
            )
    assert relative_error(torch.stack(steps, 2), whole) < 2e-6 and relative_error(state.reshape(2, e, n), last) < 2e-6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"delta": torch.zeros(2, 20, 36)}, r"delta has shape \(2, 20, 36\), expected \(b=2, e=20, l=37\)"),
        ({"u": torch.zeros(2, 20)}, r"u has shape \(2, 20\), expected \(b, e, l\)"),
        ({"A": torch.zeros(20, 5)}, r"B has shape \(2, 4, 37\), expected \(b=2, n=5, l=37\)"),
        ({"B": torch.zeros(2, 3, 4, 37)}, "B has 3 groups, which do not divide the 20 channels"),
        ({"B": torch.zeros(2, 4, 4, 37), "C": torch.zeros(2, 2, 4, 37)}, "B has 4 groups but C has 2"),
        ({"D": torch.zeros(21)}, r"D has shape \(21,\), expected \(e=20\)"),
        ({"z": torch.zeros(2, 20, 37, dtype=torch.int32)}, "z has dtype torch.int32"),
        ({"delta_bias": torch.zeros(20, device="meta")}, "delta_bias is on meta, expected cpu"),
        (
            {"initial_state": torch.zeros(2, 20, 3)},
            r"initial_state has shape \(2, 20, 3\), expected \(b=2, e=20, n=4\)",
        ),
        ({"seq_idx": torch.zeros(2, 36, dtype=torch.int32)}, r"seq_idx has shape \(2, 36\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.selective_scan_fn(**inputs() | change)
