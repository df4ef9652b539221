"""Mamba-2's scan on every backend against the float64 reference, at awkward sizes and values."""

import functools
import threading

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, native
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.released.golden import relative_error

ALL = "D z dt_bias initial_states"


def inputs(seed=0, b=2, l=37, h=4, p=5, g=2, n=6, optional=ALL, D_per_channel=False, packed=False, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    call = {
        "x": normal(b, l, h, p),
        "dt": normal(b, l, h) - 1,
        "A": -5 * torch.rand(h, generator=rng),
        "B": normal(b, l, g, n),
        "C": normal(b, l, g, n),
    }
    extra = {
        "D": normal(h, p) if D_per_channel else normal(h),
        "z": normal(b, l, h, p),
        "dt_bias": normal(h),
        "initial_states": normal(b, h, p, n),
    }
    call |= {name: extra[name] for name in optional.split()}
    call = {name: t.to(dtype if name in "x dt B C z" else torch.float32).requires_grad_() for name, t in call.items()}
    return call | {"dt_softplus": True, "seq_idx": checks.packed(b, l, rng) if packed else None}


SCAN_WITH_STATE = functools.partial(ops.mamba_chunk_scan_combined, return_final_states=True)
run = functools.partial(checks.run, SCAN_WITH_STATE)
assert_close = functools.partial(checks.assert_close, SCAN_WITH_STATE)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_reference(backend, data):
    draw = data.draw
    g = draw(st.sampled_from([1, 1, 2, 3]))
    assert_close(
        inputs(
            seed=draw(st.integers(0, 999)),
            b=draw(st.sampled_from([1, 2, 3])),
            h=g * draw(st.sampled_from([1, 2, 5])),
            g=g,
            l=draw(st.sampled_from([1, 2, 63, 64, 65, 130])),
            p=draw(st.sampled_from([1, 3, 16, 17, 64, 70])),
            n=draw(st.sampled_from([1, 4, 7, 16, 33])),
            D_per_channel=draw(st.booleans()),
            packed=draw(st.booleans()),
            optional=" ".join(k for k in ALL.split() if draw(st.booleans())),
        )
        | {
            "dt_limit": draw(st.sampled_from([(0.0, float("inf")), (0.1, 1.2)])),
            "chunk_size": draw(st.sampled_from([1, 5, 64, 256])),
        },
        backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "sizes",
    [{"l": 5000, "h": 1, "g": 1, "p": 4, "n": 8, "b": 1, "optional": ""}, {"n": 256, "p": 128, "b": 1, "l": 70}],
)
def test_extreme_sizes(backend, sizes):
    assert_close(inputs(**sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"b": 0}, {"l": 0}])
def test_nothing_to_do(backend, sizes):
    call = inputs(**sizes)
    y, last = run(backend, call)[0]
    assert y.shape == call["x"].shape and torch.equal(last, call["initial_states"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dt, A", [(1e-8, -1.0), (50.0, -1.0), (50.0, -1000.0), (1.0, -1e-9), (0.02, -20.0)])
def test_extreme_rates(backend, dt, A):
    call = inputs(l=150, optional="")
    call |= {"dt": torch.full((2, 150, 4), dt), "A": torch.full((4,), A), "dt_softplus": False}
    call["dt"][:, ::9] *= 0.1
    assert_close(call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_differences_do_not_cancel(backend):
    """Strong decay first, weak decay afterwards, in one chunk: cumulative sums from its start would lose 4 digits."""
    call = inputs(l=64, optional="")
    call["dt"] = torch.where(torch.arange(64)[:, None] < 32, 30.0, 0.01).expand(2, 64, 4)
    assert_close(call | {"A": torch.full((4,), -16.0), "dt_softplus": False}, backend, out=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sliced_and_broadcast_inputs(backend):
    """x, B and C cut out of one projection, as Mamba-2 does, and a time step shared by all heads."""
    call = inputs(b=1, l=20, h=4, p=3, g=2, n=5, optional="")
    projection = torch.randn(1, 20, 4 * 3 + 2 * 2 * 5)
    x, B, C = projection.split([12, 10, 10], dim=-1)
    call |= {
        "x": x.unflatten(-1, (4, 3)),
        "B": B.unflatten(-1, (2, 5)),
        "C": C.unflatten(-1, (2, 5)),
        "dt": torch.randn(1, 20, 1).expand(1, 20, 4),
    }
    assert_close(call, backend)
    call["x"] = torch.randn(1, 3, 20, 4).permute(0, 2, 3, 1)
    assert_close(call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(backend, dtype):
    call = inputs(dtype=dtype, l=70)
    (y, last), grads = checks.assert_rounds_once(SCAN_WITH_STATE, call, backend)
    assert y.dtype == dtype and last.dtype == torch.float32
    assert [g.dtype for g in grads[:2]] == [dtype] * 2


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend):
    call = {
        k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs(b=1, l=7, h=2, p=2, g=1, n=3, packed=True).items()
    }
    names = [k for k, v in call.items() if torch.is_tensor(v) and v.requires_grad]

    def function(*values):
        return ops.mamba_chunk_scan_combined(**call | dict(zip(names, values)), chunk_size=3, return_final_states=True)

    with ops.backend(backend):
        assert torch.autograd.gradcheck(function, [call[k] for k in names])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_with_the_state_carried_gives_the_same(backend):
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(l=150, packed=True).items()}
    along = ("x", "dt", "B", "C", "z")
    with ops.backend(backend):
        whole, last = ops.mamba_chunk_scan_combined(**call | {"seq_idx": None}, return_final_states=True)
        for cut in (1, 63, 64, 149):
            state, ys = call["initial_states"], []
            for part in (slice(0, cut), slice(cut, None)):
                piece = {k: v[:, part] if k in along else v for k, v in call.items()}
                piece |= {"initial_states": state, "seq_idx": None}
                y, state = ops.mamba_chunk_scan_combined(**piece, return_final_states=True)
                ys.append(y)
            assert relative_error(torch.cat(ys, 1), whole) < 2e-6 and relative_error(state, last) < 2e-6


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_documents_do_not_see_each_other(backend):
    call = inputs(b=1, l=100, optional="D")
    call["seq_idx"] = torch.tensor([[3] * 40 + [1] * 60])
    with ops.backend(backend):
        y = ops.mamba_chunk_scan_combined(**call)
        second = {k: v[:, 40:] if k in ("x", "dt", "B", "C") else v for k, v in call.items() if k != "seq_idx"}
        alone = ops.mamba_chunk_scan_combined(**second)
    assert relative_error(y[:, 40:], alone) < 2e-6
    leaves = [call[k] for k in ("x", "dt", "B", "C")]
    for g in torch.autograd.grad(y[:, 40:].square().sum(), leaves, retain_graph=True):
        assert g[:, :40].abs().max() == 0 and g[:, 40:].abs().max() > 0
    for g in torch.autograd.grad(y[:, :40].square().sum(), leaves):
        assert g[:, 40:].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_equal_the_whole(backend):
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(l=6).items() if k != "seq_idx"}
    state, steps = call["initial_states"].clone(), []
    with ops.backend(backend):
        whole, last = ops.mamba_chunk_scan_combined(**call, return_final_states=True)
        for t in range(6):
            at = {k: call[k][:, t] for k in ("x", "dt", "B", "C", "z")}
            heads = {k: call[k] for k in ("A", "D", "dt_bias")}
            steps.append(ops.ssd_state_update(state, dt_softplus=True, **at, **heads))
    assert relative_error(torch.stack(steps, 1), whole) < 2e-6 and relative_error(state, last) < 2e-6


@native
def test_repeats_are_identical_also_from_many_threads():
    call = inputs(b=2, l=130, h=6, p=16, n=16)
    first, results = run("c", call), []
    threads = [threading.Thread(target=lambda: results.extend(run("c", call) for _ in range(3))) for _ in range(4)]
    with ops.backend("c"):
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(results) == 12
    assert all(torch.equal(x, y) for again in results for a, b in zip(first, again) for x, y in zip(a, b))


@native
def test_poisoned_memory_is_written_over(monkeypatch):
    make = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    assert_close(inputs(l=70, p=17, packed=True), "c")


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_sees_a_proper_operator(backend):
    call = inputs(b=1, l=20, h=2, p=4, g=1, n=4)
    if backend == "c":
        args = [
            call["x"],
            call["dt"],
            call["dt"].detach().clone().requires_grad_(),
            call["B"],
            call["C"],
            torch.randn(2, 4, requires_grad=True),
            call["initial_states"],
        ]
        torch.library.opcheck(torch.ops.ssmzoo.ssd.default, (*args, None, True, backend))

    def function(x):
        return ops.mamba_chunk_scan_combined(**call | {"x": x})

    with ops.backend(backend):
        expected = function(call["x"])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(call["x"])
        torch.testing.assert_close(compiled, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(call["x"]), expected)

        plain = {k: v.detach() if torch.is_tensor(v) else v for k, v in call.items()}

        class Module(torch.nn.Module):
            def forward(self, x):
                return ops.mamba_chunk_scan_combined(**plain | {"x": x})

        exported = torch.export.export(Module(), (plain["x"],))
        torch.testing.assert_close(exported.module()(plain["x"]), expected)
        if backend == "c":
            grad = torch.autograd.grad(function(call["x"]).sum(), call["x"], create_graph=True)[0]
            with pytest.raises(RuntimeError, match="no double backward"):
                grad.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 37, 20)}, r"x has shape \(2, 37, 20\), expected \(b, l, h, p\)"),
        ({"dt": torch.zeros(2, 37, 3)}, r"dt has shape \(2, 37, 3\), expected \(b=2, l=37, h=4\)"),
        (
            {"B": torch.zeros(2, 37, 3, 6), "C": torch.zeros(2, 37, 3, 6)},
            "B has 3 groups, which do not divide the 4 heads",
        ),
        ({"C": torch.zeros(2, 37, 2, 7)}, r"C has shape \(2, 37, 2, 7\), expected \(b=2, l=37, g=2, n=6\)"),
        ({"D": torch.zeros(4, 6)}, r"D has shape \(4, 6\), expected \(h=4, p=5\)"),
        ({"dt_limit": (2, 1)}, r"dt_limit = \(2, 1\), expected \(lowest, highest\)"),
        ({"chunk_size": 0}, "chunk_size = 0, expected at least 1"),
        ({"z": torch.zeros(2, 37, 4, 5, dtype=torch.long)}, "z has dtype torch.int64"),
        ({"initial_states": torch.zeros(2, 4, 5, 7)}, "initial_states has shape"),
        ({"seq_idx": torch.zeros(2, 37)}, "seq_idx has dtype torch.float32"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.mamba_chunk_scan_combined(**inputs() | change)
