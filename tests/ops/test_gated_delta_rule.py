"""The gated delta rule with both decays on every backend against the float64 reference and the published numbers."""

import functools

import against_reference as checks
import pytest
import torch
import torch.nn.functional as F
from against_reference import BACKENDS, native
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops
from ssmzoo.released.golden import relative_error

every_backend = pytest.mark.parametrize("backend", BACKENDS)
both_decays = pytest.mark.parametrize("per_channel", [False, True], ids=["per head", "per channel"])


def inputs(seed=0, b=2, l=37, h=3, n=5, p=6, per_channel=False, packed=False, state=True, top=2.0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    call = {
        "q": n**-0.5 * F.normalize(normal(b, l, h, n), dim=-1),
        "k": F.normalize(normal(b, l, h, n), dim=-1),
        "v": normal(b, l, h, p),
        "g": -F.softplus(normal(b, l, h, n) if per_channel else normal(b, l, h)),
        "beta": top * torch.rand(b, l, h, generator=rng),
    }
    call |= {"initial_state": normal(b, h, n, p)} if state else {}
    call = {name: t.to(dtype if name != "initial_state" else torch.float32) for name, t in call.items()}
    return call | {"seq_idx": checks.packed(b, l, rng) if packed else None}


run = functools.partial(checks.run, ops.gated_delta_rule)
assert_close = functools.partial(checks.assert_close, ops.gated_delta_rule)


@every_backend
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_reference(backend, data):
    draw = data.draw
    call = inputs(
        seed=draw(st.integers(0, 999)),
        b=draw(st.sampled_from([1, 2, 3])),
        l=draw(st.sampled_from([1, 2, 15, 32, 33, 65, 130])),
        h=draw(st.sampled_from([1, 3])),
        n=draw(st.sampled_from([1, 3, 16, 17, 40])),
        p=draw(st.sampled_from([1, 3, 16, 33, 70])),
        per_channel=draw(st.booleans()),
        packed=draw(st.booleans()),
        state=draw(st.booleans()),
        top=draw(st.sampled_from([1.0, 2.0])),
    )
    assert_close(call | {"chunk_size": draw(st.sampled_from([1, 5, 64]))}, backend)


def published(*shape, p):
    return torch.sin(0.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + p).reshape(shape)


def normalised(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("chunk_size", [3, 64])
@pytest.mark.parametrize(
    "g, last, total",
    [
        (-F.softplus(published(1, 6, 1, p=4)), [-0.060845, 0.168913, 0.319229], 0.870536),
        (-F.softplus(published(1, 6, 1, 2, p=5)), [-0.095931, 0.128947, 0.293180], 0.903987),
    ],
    ids=["Gated DeltaNet", "Kimi"],
)
def test_numbers_of_the_published_recurrence(backend, chunk_size, g, last, total):
    q, k = (normalised(published(1, 6, 1, 2, p=p)) for p in (0, 1))
    v, beta = published(1, 6, 1, 3, p=2), torch.sigmoid(published(1, 6, 1, p=3))
    with ops.backend(backend):
        y, _ = ops.gated_delta_rule(2**-0.5 * q, k, v, g, beta, chunk_size=chunk_size)
    torch.testing.assert_close(y[0, 5, 0], torch.tensor(last, dtype=torch.float64), rtol=0, atol=1e-6)
    assert abs(float(y.sum()) - total) < 2e-6


@both_decays
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradcheck(backend, per_channel):
    call = inputs(b=1, l=7, h=2, n=3, p=2, per_channel=per_channel, packed=True)
    call = {
        k: v.double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()
    }
    names = [k for k, v in call.items() if torch.is_tensor(v) and v.requires_grad]

    def function(*values):
        return ops.gated_delta_rule(**call | dict(zip(names, values)), chunk_size=3)

    with ops.backend(backend):
        assert torch.autograd.gradcheck(function, [call[k] for k in names])


@both_decays
@every_backend
@pytest.mark.parametrize("decay", [0.0, -1e-9, -80.0, -1e4])
def test_extreme_decays(backend, per_channel, decay):
    call = inputs(l=70, per_channel=per_channel)
    call["g"] = torch.full_like(call["g"], decay)
    call["g"][:, ::7] = -0.1
    assert_close(call, backend)


@both_decays
@every_backend
@pytest.mark.parametrize("sizes", [{"b": 0}, {"l": 0}])
def test_nothing_to_do(backend, per_channel, sizes):
    call = inputs(**sizes, per_channel=per_channel)
    y, last = run(backend, call)[0]
    assert y.shape == call["v"].shape and torch.equal(last, call["initial_state"])


@both_decays
@every_backend
def test_any_split_with_the_state_carried_gives_the_same(backend, per_channel):
    call = inputs(l=80, per_channel=per_channel)
    del call["seq_idx"]
    with ops.backend(backend):
        whole, last = ops.gated_delta_rule(**call)
        for sizes in ([1, 79], [31, 49], [32, 48], [40] + [1] * 40):
            state, ys = call["initial_state"], []
            for piece in zip(*(call[k].split(sizes, dim=1) for k in ("q", "k", "v", "g", "beta"))):
                y, state = ops.gated_delta_rule(*piece, state)
                ys.append(y)
            assert relative_error(torch.cat(ys, 1), whole) < 2e-6 and relative_error(state, last) < 2e-6


@both_decays
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_documents_do_not_see_each_other(backend, per_channel):
    call = inputs(b=1, l=100, per_channel=per_channel, state=False)
    call = {k: v.requires_grad_() for k, v in call.items() if v is not None}
    with ops.backend(backend):
        y, _ = ops.gated_delta_rule(**call, seq_idx=torch.tensor([[3] * 40 + [1] * 60]))
        alone, _ = ops.gated_delta_rule(**{k: v[:, 40:] for k, v in call.items()})
    assert relative_error(y[:, 40:], alone) < 2e-6
    for grad in torch.autograd.grad(y[:, 40:].square().sum(), list(call.values())):
        assert grad[:, :40].abs().max() == 0 and grad[:, 40:].abs().max() > 0


@every_backend
def test_padding_changes_nothing(backend):
    call = inputs(l=9, state=True)
    padded = {k: F.pad(v, (0, 0) * (v.ndim - 2) + (0, 4)) for k, v in call.items() if k in ("q", "k", "v", "g", "beta")}
    with ops.backend(backend):
        _, last = ops.gated_delta_rule(**call)
        _, after = ops.gated_delta_rule(**padded, initial_state=call["initial_state"])
    assert relative_error(after, last) < 1e-6


@every_backend
def test_heads_cut_out_of_one_projection(backend):
    call = inputs(b=2, l=20, h=3, n=4, p=6)
    q, k, v = torch.randn(2, 20, 3 * (4 + 4 + 6)).split([12, 12, 18], dim=-1)
    call |= {
        "q": q.unflatten(-1, (3, 4)),
        "k": F.normalize(k.unflatten(-1, (3, 4)), dim=-1),
        "v": v.unflatten(-1, (3, 6)),
    }
    assert_close(call | {"beta": torch.rand(2, 20, 1).expand(2, 20, 3)}, backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(backend, dtype):
    call = inputs(dtype=dtype, l=70)
    (y, last), grads = checks.assert_rounds_once(ops.gated_delta_rule, call, backend)
    assert y.dtype == dtype and last.dtype == torch.float32
    assert [g.dtype for g in grads[:5]] == [dtype] * 5


@native
@both_decays
def test_compiled_code_traces_the_kernel(per_channel):
    call = {k: v for k, v in inputs(l=20, per_channel=per_channel).items() if v is not None}
    compiled = torch.compile(ops.gated_delta_rule, fullgraph=True, backend="aot_eager")
    for got, expected in zip(run_with(compiled, call), run_with(ops.gated_delta_rule, call)):
        torch.testing.assert_close(got, expected)


def run_with(function, call):
    leaves = {k: v.clone().requires_grad_() for k, v in call.items()}
    y, state = function(**leaves)
    return y, state, *torch.autograd.grad(y.square().sum() + state.sum(), list(leaves.values()))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"g": torch.zeros(2, 37, 3, 4)}, r"g has shape \(2, 37, 3, 4\), expected \(b=2, l=37, h=3, n=5\)"),
        ({"beta": torch.zeros(2, 37)}, r"beta has shape \(2, 37\)"),
        ({"k": torch.zeros(2, 37, 1, 5)}, r"k has shape \(2, 37, 1, 5\)"),
        ({"chunk_size": 0}, "chunk_size = 0, expected at least 1"),
        ({"seq_idx": torch.zeros(2, 37)}, "seq_idx has dtype torch.float32"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        ops.gated_delta_rule(**inputs() | change)
