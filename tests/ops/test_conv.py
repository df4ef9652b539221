"""causal_conv1d on every backend against the float64 reference."""

import against_reference as checks
import pytest
import torch
from against_reference import BACKENDS, native
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmzoo import ops


def inputs(seed, b, c, l, k, channels_last=False, bias=True, initial=True, packed=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, l, c, generator=g).transpose(1, 2) if channels_last else torch.randn(b, c, l, generator=g)
    leaves = {"x": x, "weight": torch.randn(c, k, generator=g)}
    if bias:
        leaves["bias"] = torch.randn(c, generator=g)
    if initial:
        leaves["initial_states"] = torch.randn(b, c, k - 1, generator=g)
    leaves = {name: t.to(dtype).requires_grad_() for name, t in leaves.items()}
    if not packed:
        return leaves, None
    seq_idx, padding = (torch.rand(b, l, generator=g) < 0.2 for _ in range(2))
    return leaves, seq_idx.cumsum(1).masked_fill(padding, -1)


def conv(leaves, seq_idx=None, activation="silu"):
    """All arguments of `ops.causal_conv1d_fn`."""
    return leaves | {"seq_idx": seq_idx, "activation": activation, "return_final_states": True}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_reference(backend, data):
    draw = data.draw
    leaves, seq_idx = inputs(
        draw(st.integers(0, 999)),
        draw(st.sampled_from([0, 1, 2, 3])),
        draw(st.sampled_from([1, 3, 15, 16, 17, 40, 300])),
        draw(st.sampled_from([1, 2, 3, 5, 63, 64, 65, 70, 150])),
        draw(st.sampled_from([1, 2, 3, 4, 5, 9, 70])),
        *(draw(st.booleans()) for _ in range(4)),
    )
    call = conv(leaves, seq_idx, draw(st.sampled_from([None, "silu"])))
    checks.assert_close(ops.causal_conv1d_fn, call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_more_taps_than_a_chunk_has_steps(backend, channels_last, packed):
    """The second chunk of steps begins within reach of the initial states."""
    leaves, seq_idx = inputs(0, 2, 17, 150, 70, channels_last, packed=packed)
    checks.assert_close(ops.causal_conv1d_fn, conv(leaves, seq_idx), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(backend, dtype):
    """Half-precision inputs are computed in float32: the result is the exact one, rounded."""
    leaves, _ = inputs(0, 2, 20, 37, 4, channels_last=True, dtype=dtype)
    (out, states), _ = checks.assert_rounds_once(ops.causal_conv1d_fn, conv(leaves), backend)
    assert out.dtype == states.dtype == dtype


def test_gradcheck():
    leaves, seq_idx = inputs(0, 2, 3, 7, 3, packed=True, dtype=torch.float64)
    for backend in ("reference", "torch"):

        def function(x, weight, bias, initial_states):
            with ops.backend(backend):  # noqa: B023
                return ops.causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, True, activation="silu")

        assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_any_split_with_carried_states_gives_the_same(backend):
    leaves, _ = inputs(3, 2, 18, 20, 4)
    x, rest = leaves["x"].detach(), {n: leaves[n].detach() for n in ("weight", "bias")}
    with ops.backend(backend):
        whole = ops.causal_conv1d_fn(x, **rest, activation="silu")
        for cut in (1, 2, 3, 11, 19):
            a, states = ops.causal_conv1d_fn(x[..., :cut], **rest, return_final_states=True, activation="silu")
            b = ops.causal_conv1d_fn(x[..., cut:], **rest, initial_states=states, activation="silu")
            torch.testing.assert_close(torch.cat([a, b], 2), whole)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_packed_documents_do_not_see_each_other(backend):
    leaves, _ = inputs(4, 1, 5, 12, 4, initial=False)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7])
    with ops.backend(backend):
        out, states = ops.causal_conv1d_fn(**leaves, seq_idx=seq_idx, return_final_states=True, activation="silu")
        alone = ops.causal_conv1d_fn(leaves["x"][..., 5:], leaves["weight"], leaves["bias"], activation="silu")
    torch.testing.assert_close(out[..., 5:], alone)
    torch.testing.assert_close(states, leaves["x"][..., -3:])
    (grad,) = torch.autograd.grad(out[..., 5:].sum(), leaves["x"])
    assert (grad[..., :5] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int8])
def test_padding_is_zero_and_takes_no_part(backend, activation, dtype):
    """Negative sequence indices: y = 0 there, whatever x and its gradient hold; all else as without."""
    leaves, _ = inputs(9, 2, 37, 150, 4)
    start, end = 3, 131  # of the one sequence; both sides are padding
    seq_idx = torch.full((2, 150), -1, dtype=dtype)
    seq_idx[:, start:end] = 7
    seq_idx[1, end:] = -2
    dout = torch.randn(2, 37, 150)

    def run(x, dout, **options):
        given = [t.detach().requires_grad_() for t in (x, leaves["weight"], leaves["bias"])]
        with ops.backend(backend):
            out, states = ops.causal_conv1d_fn(*given, return_final_states=True, activation=activation, **options)
        return out, states, *torch.autograd.grad(out, given, dout)

    inside = (seq_idx >= 0)[:, None]
    x, dout = (torch.where(inside, t.detach(), torch.nan) for t in (leaves["x"], dout))
    out, states, dx, *grads = run(x, dout, seq_idx=seq_idx)
    alone, _, dx_alone, *expected = run(x[..., start:end], dout[..., start:end])
    for whole, part in ((out, alone), (dx, dx_alone)):
        torch.testing.assert_close(whole[..., start:end], part)
        assert (whole[..., :start] == 0).all() and (whole[..., end:] == 0).all()
    torch.testing.assert_close(grads, expected)
    assert (states == 0).all()


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_update_equals_the_whole(backend):
    leaves, _ = inputs(5, 3, 21, 9, 4, initial=False)
    x, rest = leaves["x"].detach(), {n: leaves[n].detach() for n in ("weight", "bias")}
    whole = ops.causal_conv1d_fn(x, **rest, activation="silu")
    with ops.backend(backend):
        for size in (3, 4, 6):
            state = torch.zeros(3, 21, size)
            tokens = x.permute(2, 0, 1).contiguous()
            steps = [ops.causal_conv1d_update(token, state, **rest, activation="silu") for token in tokens]
            torch.testing.assert_close(torch.stack(steps, 2), whole)
            torch.testing.assert_close(state, x[..., 9 - size :])


def test_update_with_a_circular_buffer():
    leaves, _ = inputs(6, 2, 4, 9, 3, initial=False)
    x, rest = leaves["x"].detach(), {n: leaves[n].detach() for n in ("weight", "bias")}
    state, seen = torch.zeros(2, 4, 5), torch.zeros(2, dtype=torch.int32)
    parts = []
    for token in x.split([4, 1, 3, 1], dim=2):
        parts.append(ops.causal_conv1d_update(token, state, **rest, cache_seqlens=seen))
        seen += token.shape[2]
    torch.testing.assert_close(torch.cat(parts, 2), ops.causal_conv1d_fn(x, **rest))


def test_final_states_go_where_they_are_asked_to():
    leaves, _ = inputs(7, 2, 4, 2, 4)
    target = torch.empty(2, 4, 3)
    with torch.no_grad():
        _, states = ops.causal_conv1d_fn(**leaves, return_final_states=True, final_states_out=target)
    assert states is target
    torch.testing.assert_close(target, torch.cat([leaves["initial_states"], leaves["x"]], 2)[..., -3:])


@native
def test_c_traces_and_repeats_exactly():
    leaves, seq_idx = inputs(8, 2, 50, 90, 4, packed=True)
    first, second = (checks.run(ops.causal_conv1d_fn, "c", conv(leaves, seq_idx)) for _ in range(2))
    assert all(torch.equal(x, y) for a, b in zip(first, second) for x, y in zip(a, b))
    args = (leaves["x"], leaves["weight"], leaves["bias"], seq_idx, leaves["initial_states"], "silu", True, "c")
    torch.library.opcheck(torch.ops.ssmzoo.causal_conv1d.default, args)
    grad = torch.autograd.grad(torch.ops.ssmzoo.causal_conv1d(*args).sum(), leaves["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()
    step = (torch.randn(2, 50), torch.randn(2, 50, 3), leaves["weight"].detach(), None, "silu", None, None)
    torch.library.opcheck(torch.ops.ssmzoo.causal_conv1d_update.default, step)
    tokens = torch.randn(2, 3, 50).transpose(1, 2)
    rows, seen = torch.tensor([4, 1]), torch.tensor([0, 7], dtype=torch.int32)
    step = (tokens, torch.randn(5, 50, 3), leaves["weight"].detach(), None, None, seen, rows)
    torch.library.opcheck(torch.ops.ssmzoo.causal_conv1d_update.default, step)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(5, 4)}, r"weight has shape \(5, 4\), expected \(c=4, k\)"),
        ({"x": torch.zeros(2, 4)}, r"x has shape \(2, 4\), expected \(b, c, l\)"),
        ({"initial_states": torch.zeros(2, 4, 4)}, r"initial_states has shape .* expected \(b=2, c=4, k-1=3\)"),
        ({"activation": "relu"}, "activation is 'relu', expected"),
        ({"seq_idx": torch.zeros(2, 6)}, "seq_idx has dtype"),
        ({"final_states_out": torch.zeros(2, 4, 3)}, "return_final_states is False"),
        ({"bias": torch.zeros(4, dtype=torch.int64)}, "bias has dtype torch.int64"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta, expected cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        ops.causal_conv1d_fn(**({"x": torch.zeros(2, 4, 6), "weight": torch.zeros(4, 4)} | change))
