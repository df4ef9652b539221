"""The dense scan of SD-SSM on every backend against the float64 reference and the definition."""

import functools
import sys

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, native
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.ops.dense_scan import MIX, Mixing
from ssmzoo.released.golden import relative_error


def inputs(
    seed=0,
    b=3,
    l=23,
    n=6,
    k=3,
    s=4,
    symbols=True,
    per_symbol=False,
    state=True,
    masked=False,
    packed=False,
    dtype=torch.float32,
):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    call = {
        "A_dict": normal(n, n, k),
        "weights": normal(*((s,) if symbols else (b, l)), k).softmax(-1),
        "inputs": normal(s, n) if per_symbol and symbols else normal(b, l, n),
    }
    call |= {"initial_state": normal(b, n)} if state else {}
    call = {name: t.to(dtype).requires_grad_() for name, t in call.items()}
    return call | {
        "p_norm": 1.3,
        "symbols": torch.randint(0, s, (b, l), generator=rng) if symbols else None,
        "mask": torch.rand(b, l, generator=rng) > 0.3 if masked else None,
        "seq_idx": checks.packed(b, l, rng) if packed else None,
    }


run = functools.partial(checks.run, ops.dense_scan)
assert_close = functools.partial(checks.assert_close, ops.dense_scan)


def test_reference_is_the_papers_definition():
    """Softmax mixture, columns normalised after mixing, input after the transition: written out for one sequence."""
    A, w, x = torch.randn(4, 4, 2).double(), torch.rand(1, 5, 2).double().softmax(-1), torch.randn(1, 5, 4).double()
    h = torch.zeros(4).double()
    for t in range(5):
        M = sum(w[0, t, k] * A[:, :, k] for k in range(2))
        T = torch.stack([M[:, j] / M[:, j].abs().pow(1.4).sum().pow(1 / 1.4) for j in range(4)], dim=1)
        h = T @ h + x[0, t]
    with ops.backend("reference"):
        states, last = ops.dense_scan(A, w, x, 1.4)
    torch.testing.assert_close(last[0], h)
    assert torch.equal(states[:, -1], last)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_reference(backend, data):
    draw = data.draw
    symbols = backend == "c" or draw(st.booleans())
    call = inputs(
        seed=draw(st.integers(0, 999)),
        b=draw(st.sampled_from([1, 3])),
        symbols=symbols,
        l=draw(st.sampled_from([1, 2, 7, 40])),
        n=draw(st.sampled_from([2, 3, 8, 16, 17, 64, 70])),
        s=draw(st.sampled_from([1, 5, 60])),
        per_symbol=draw(st.booleans()),
        state=draw(st.booleans()),
        masked=draw(st.booleans()),
        packed=draw(st.booleans()),
    )
    parallel = draw(st.booleans()) if backend == "torch" else None
    assert_close(
        call
        | {"all_steps": draw(st.booleans()), "p_norm": draw(st.sampled_from([1.0, 1.2, 2.0])), "parallel": parallel},
        backend,
    )


@native
def test_more_steps_than_are_sorted_at_once():
    assert_close(inputs(b=400, l=43, n=5, masked=True), "c")  # 17,200 steps


@pytest.mark.parametrize("symbols", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_slices_of_time_fit_together(monkeypatch, symbols, parallel):
    monkeypatch.setattr(sys.modules["ssmzoo.ops.dense_scan.torch"], "SLICE_ELEMENTS", 12 * 3 * 36)  # 12 steps of the 45
    call = inputs(l=45, symbols=symbols, masked=True, packed=True) | {"parallel": parallel}
    assert_close(call, "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{"b": 0}, {"l": 0}])
def test_nothing_to_do(backend, sizes):
    call = inputs(**sizes)
    states, last = run(backend, call)[0]
    assert states.shape == call["inputs"].shape and torch.equal(last, call["initial_state"])


@pytest.mark.parametrize("symbols", [True, False])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend, symbols):
    call = {
        k: v.detach().double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs(b=2, l=9, n=3, k=2, symbols=symbols, masked=True, packed=True).items()
    }
    names = [k for k, v in call.items() if torch.is_tensor(v) and v.requires_grad]

    def function(*values):
        return ops.dense_scan(**call | dict(zip(names, values)), parallel=True)

    with ops.backend(backend):
        assert torch.autograd.gradcheck(function, [call[k] for k in names])


@pytest.mark.parametrize("backend", BACKENDS)
def test_symbols_equal_their_one_hot_mixture(backend):
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs().items()}
    with ops.backend(backend):
        states, _ = ops.dense_scan(**call)
    weights = call["weights"][call["symbols"]]
    general, _ = ops.dense_scan(**call | {"weights": weights, "symbols": None})
    assert relative_error(states, general) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_with_the_state_carried_gives_the_same(backend):
    call = {k: v.detach() if torch.is_tensor(v) else v for k, v in inputs(l=40).items()}
    with ops.backend(backend):
        whole, last = ops.dense_scan(**call)
        for cut in (1, 17, 39):
            state, pieces = call["initial_state"], []
            for part in (slice(0, cut), slice(cut, None)):
                piece = call | {k: call[k][:, part] for k in ("inputs", "symbols")} | {"initial_state": state}
                states, state = ops.dense_scan(**piece)
                pieces.append(states)
            assert relative_error(torch.cat(pieces, 1), whole) < 2e-6 and relative_error(state, last) < 2e-6


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_masked_steps_and_documents(backend):
    """Padding leaves the state alone whatever it holds; a new document starts from zero, without a gradient across."""
    call = inputs(b=1, l=20)
    symbols, mask = call["symbols"].clone(), torch.ones(1, 20, dtype=torch.bool)
    symbols[:, 5:9], mask[:, 5:9] = -100, False
    kept = [t for t in range(20) if not 5 <= t < 9]
    with ops.backend(backend):
        states, last = ops.dense_scan(**call | {"symbols": symbols, "mask": mask})
        _, without = ops.dense_scan(**call | {"symbols": symbols[:, kept], "inputs": call["inputs"][:, kept]})
        packed, _ = ops.dense_scan(**call | {"seq_idx": torch.tensor([[7] * 8 + [2] * 12])})
    assert torch.equal(states[:, 8], states[:, 4])
    assert relative_error(last, without) < 2e-6
    assert torch.equal(packed[:, 8], call["inputs"][:, 8])
    grad, of_state = torch.autograd.grad(packed[:, 8:].square().sum(), [call["inputs"], call["initial_state"]])
    assert grad[:, :8].abs().max() == 0 and of_state.abs().max() == 0


@native
def test_hundred_thousand_steps_keep_one_state():
    """With p = 1 the 1-norm grows at most by that of the input, however long the sequence."""
    call = {
        k: v.detach() if torch.is_tensor(v) else v
        for k, v in inputs(b=1, l=100_000, per_symbol=True, state=False).items()
    }
    states, last = ops.dense_scan(**call | {"p_norm": 1.0, "all_steps": False})
    assert states.shape == (1, 1, 6) and torch.equal(states[:, 0], last)
    assert last.isfinite().all() and last.abs().sum() <= 100_000 * call["inputs"].abs().sum(-1).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_and_repeats(backend):
    call = inputs(dtype=torch.bfloat16)
    (states, last), grads = checks.assert_rounds_once(ops.dense_scan, call, backend)
    assert states.dtype == torch.bfloat16 and last.dtype == torch.float32 and grads[0].dtype == torch.bfloat16
    for a, b in zip((states, last, *grads), [x for part in run(backend, call) for x in part]):
        assert torch.equal(a, b)


@native
def test_poisoned_memory_is_written_over(monkeypatch):
    make, make_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: make_like(*a, **k).fill_(float("nan")))
    for backend in ("c", "torch"):
        assert_close(inputs(n=17, masked=True, packed=True), backend)


# mixtures that differ at every step run in PyTorch alone
@pytest.mark.parametrize("backend, symbols", [("torch", True), ("torch", False), pytest.param("c", True, marks=native)])
def test_torch_sees_a_proper_operator(backend, symbols):
    call = inputs(symbols=symbols, l=9)
    codes, h0 = torch.randint(0, 4, (3, 9), dtype=torch.int32), torch.randn(3, 6, requires_grad=True)
    if symbols:
        args = (torch.randn(4, 6, 6, requires_grad=True), call["inputs"], codes, h0, True, False, True, backend)
        torch.library.opcheck(torch.ops.ssmzoo.dense_scan_symbols.default, args)
    else:
        args = (call["A_dict"], call["weights"], call["inputs"], codes * 0, h0, 1.3, True, False, True, backend)
        torch.library.opcheck(torch.ops.ssmzoo.dense_scan_mixture.default, args)

    def function(x):
        return ops.dense_scan(**call | {"inputs": x})[0]

    with ops.backend(backend):
        expected = function(call["inputs"])
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(call["inputs"])
        torch.testing.assert_close(compiled, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(function(call["inputs"]), expected)
        grad = torch.autograd.grad(expected.sum(), call["inputs"], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="no double backward"):
            grad.sum().backward()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("symbol", [-1, 4, 2**28, 2**40])
def test_symbols_out_of_range(backend, symbol):
    call = inputs()
    call["symbols"][1, 3] = symbol
    with ops.backend(backend), pytest.raises(IndexError, match="but weights describes the symbols 0 to 3"):
        ops.dense_scan(**call)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A_dict": torch.zeros(6, 5, 3)}, r"A_dict has shape \(6, 5, 3\), expected \(n=6, n=6, k\)"),
        ({"weights": torch.zeros(3, 23, 3)}, r"weights has shape \(3, 23, 3\), expected \(s, k=3\)"),
        ({"symbols": None}, r"weights has shape \(4, 3\), expected \(b, l, k\): give symbols with \(s, k\)"),
        ({"symbols": torch.zeros(3, 23)}, "symbols has dtype torch.float32"),
        ({"inputs": torch.zeros(3, 22, 6)}, r"inputs has shape \(3, 22, 6\), expected \(b=3, l=23, n=6\)"),
        ({"inputs": torch.zeros(5, 6)}, r"inputs has shape \(5, 6\), expected \(s=4, n=6\)"),
        ({"initial_state": torch.zeros(3, 7)}, r"initial_state has shape \(3, 7\), expected \(b=3, n=6\)"),
        ({"mask": torch.zeros(3, 23)}, "mask is torch.float32"),
        ({"seq_idx": torch.zeros(3, 23)}, "seq_idx has dtype torch.float32"),
        ({"p_norm": 0}, "p_norm = 0, expected a positive number"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.dense_scan(**inputs() | change)


@native
@pytest.mark.parametrize("n, p", [(37, 1.0), (64, 1.2), (5, 3.0)])
def test_mixed_and_normalised_columns_on_compiled_kernels(n, p):
    A, weights, dT = torch.randn(n, n, 3) * 10 ** torch.randn(n, n, 3), torch.rand(4, 3), torch.randn(4, n, n)
    results = []
    for dtype in (torch.float32, torch.float64):
        given = [t.to(dtype).requires_grad_() for t in (A, weights)]
        T = MIX(Mixing(*given, p), "c") if dtype == torch.float32 else ops.mix_transitions(*given, p)
        results.append((T, *torch.autograd.grad(T, given, dT.to(dtype))))
    for got, expected in zip(*results):
        assert (got - expected).norm() < 2e-6 * expected.norm()
    A, weights = A.detach(), weights.detach()
    A[:, 1] = 0  # NaN as in the reference
    torch.testing.assert_close(
        MIX(Mixing(A, weights, p), "c"), ops.mix_transitions(A, weights, p), equal_nan=True, rtol=1e-5, atol=1e-7
    )
