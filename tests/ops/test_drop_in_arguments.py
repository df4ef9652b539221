"""Arguments of upstream's functions: rows of a larger state, circular states, packed sequences, and their order."""

import inspect
import math

import against_reference
import pytest
import torch

from ssmzoo import ops

BACKENDS = ["reference", *against_reference.BACKENDS]
# Names in order with their defaults, as mamba-ssm 2.3.2 and causal-conv1d 1.7.0 have them; ours may have more behind.
UPSTREAM = {
    "selective_state_update": (
        "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None"
    ),
    "mamba_chunk_scan_combined": (
        "x dt A B C chunk_size D=None z=None dt_bias=None initial_states=None seq_idx=None cu_seqlens=None "
        "dt_softplus=False dt_limit=(0.0,math.inf) return_final_states=False return_varlen_states=False"
    ),
    "causal_conv1d_update": (
        "x conv_state weight bias=None activation=None cache_seqlens=None conv_state_indices=None"
    ),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is filled with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", UPSTREAM)
def test_arguments_stand_in_upstreams_order(name):
    ours = list(inspect.signature(getattr(ops, name)).parameters.values())
    for argument, parameter in zip(UPSTREAM[name].split(), ours, strict=False):
        known, _, default = argument.partition("=")
        assert parameter.name == known
        if default:
            assert parameter.default == eval(default, {"math": math})


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


# ---------------------------------------------------------------- rows of a larger state (continuous batching)


def update_arguments(b=5, h=None, e=19, n=7, g=1, dtype=torch.float32):
    channels = (e,) if h is None else (h, e)
    return {
        "x": randn(b, *channels, dtype=dtype),
        "dt": randn(b, *channels, dtype=dtype),
        "A": -randn(*channels, n, dtype=dtype).exp(),
        "B": randn(b, g, n, dtype=dtype),
        "C": randn(b, g, n, dtype=dtype),
        "D": randn(*channels, dtype=dtype),
        "z": randn(b, *channels, dtype=dtype),
        "dt_bias": randn(*channels, dtype=dtype),
        "dt_softplus": True,
    }


def check_rows(update, states, indices, backend, tolerance=1e-5):
    """`update(states, rows)` on some rows equals the update of those rows alone; all others stay bit for bit."""
    alone = states[indices.clamp(min=0).long()].clone()
    with ops.backend("reference"):
        expected = update(alone, None)
    cache = states.clone()
    with ops.backend(backend):
        got = update(cache, indices)
    kept = indices >= 0
    torch.testing.assert_close(got[kept], expected[kept], rtol=tolerance, atol=tolerance)
    assert (got[~kept] == 0).all()
    torch.testing.assert_close(cache[indices[kept].long()], alone[kept], rtol=tolerance, atol=tolerance)
    untouched = torch.ones(len(states), dtype=torch.bool)
    untouched[indices[kept].long()] = False
    assert torch.equal(
        cache[untouched],
        states[untouched],
    )


INDICES = {
    "some": [7, 0, 3, 9, 1],
    "padded": [4, -1, 0, -1, 8],
    "padded in front": [-1, -1, 2, 5, 0],
    "nothing but padding": [-1, -1, -1, -1, -1],
}
each_indices = pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES)


@every_backend
@each_indices
@pytest.mark.parametrize("heads, groups", [(None, 1), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_state_update_on_rows(backend, indices, heads, groups, dtype):
    arguments = update_arguments(h=heads, g=groups)
    states = randn(10, *arguments["A"].shape)
    check_rows(
        lambda state, rows: ops.selective_state_update(state, **arguments, state_batch_indices=rows),
        states,
        torch.tensor(indices, dtype=dtype),
        backend,
    )


@every_backend
@each_indices
@pytest.mark.parametrize("length", [None, 1, 4, 5])
@pytest.mark.parametrize("taps, size", [(2, 1), (4, 3), (3, 6), (1, 0)])
@pytest.mark.parametrize("circular", [False, True])
def test_convolution_update_on_rows(backend, indices, length, taps, size, circular):
    x = randn(5, 19) if length is None else randn(5, 19, length)
    rest = {"weight": randn(19, taps), "bias": randn(19), "activation": "silu"}
    if circular:
        rest["cache_seqlens"] = torch.tensor([0, 7, 2, 31, 5], dtype=torch.int32)
    check_rows(
        lambda state, rows: ops.causal_conv1d_update(x, state, **rest, conv_state_indices=rows),
        randn(10, 19, size),
        torch.tensor(indices, dtype=torch.int32),
        backend,
    )


@pytest.mark.parametrize("indices", [[2, 0, 3], [1, -1, 3], [-1, -1, -1]])
def test_gradients_through_rows(indices):
    arguments = update_arguments(b=3, e=2, n=2, dtype=torch.float64)
    indices, states = torch.tensor(indices), randn(4, 2, 2, dtype=torch.float64).requires_grad_()
    x, weight = randn(3, 2, 2, dtype=torch.float64).requires_grad_(), randn(2, 3, dtype=torch.float64).requires_grad_()

    def scan(states, x):
        new = states.clone()
        return ops.selective_state_update(new, **arguments | {"x": x}, state_batch_indices=indices), new

    def convolve(states, x, weight, seen):
        new = states.clone()
        return ops.causal_conv1d_update(x, new, weight, None, "silu", seen, indices), new

    assert torch.autograd.gradcheck(scan, (states, x[..., 0].detach().requires_grad_()))
    for seen in (None, torch.tensor([0, 3, 4])):
        assert torch.autograd.gradcheck(lambda *t, seen=seen: convolve(*t, seen), (states, x, weight))


@every_backend
def test_rows_that_do_not_exist_are_an_error(backend):
    with ops.backend(backend):
        with pytest.raises(IndexError, match="10"):
            ops.selective_state_update(
                randn(10, 19, 7), **update_arguments(), state_batch_indices=torch.tensor([0, 1, 2, 3, 10])
            )
        with pytest.raises(IndexError, match="10"):
            ops.causal_conv1d_update(
                randn(2, 4), randn(10, 4, 3), randn(4, 4), conv_state_indices=torch.tensor([10, 1])
            )


def test_rows_have_as_many_indices_as_sequences():
    with pytest.raises(ValueError, match=r"state_batch_indices has shape \(4,\), expected \(b=5\)"):
        ops.selective_state_update(randn(10, 19, 7), **update_arguments(), state_batch_indices=torch.arange(4))
    with pytest.raises(ValueError, match=r"conv_state_indices has dtype torch.float32"):
        ops.causal_conv1d_update(randn(2, 4), randn(10, 4, 3), randn(4, 4), conv_state_indices=randn(2))


# ---------------------------------------------------------------- circular states


@every_backend
@pytest.mark.parametrize("taps, size", [(3, 2), (4, 3), (4, 5), (2, 9)])
@pytest.mark.parametrize("cuts", [(7, 1, 12), (20,), (1, 1, 18), (2, 3, 15)])
def test_any_number_of_tokens_fits_a_circular_state(backend, taps, size, cuts):
    """The outputs are the whole convolution's; the state holds the last `size` inputs, each at its step modulo size."""
    x, weight, bias = randn(2, 19, 20), randn(19, taps), randn(19)
    state, seen, parts = torch.zeros(2, 19, size), torch.zeros(2, dtype=torch.int32), []
    with ops.backend(backend):
        for tokens in x.split(cuts, 2):
            parts.append(ops.causal_conv1d_update(tokens, state, weight, bias, "silu", seen))
            seen += tokens.shape[2]
    whole = ops.causal_conv1d_fn(x, weight, bias, activation="silu")
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)
    for step in range(20 - size, 20):
        assert torch.equal(state[..., step % size], x[..., step])


# ---------------------------------------------------------------- states of packed sequences


def packed_arguments(lengths, h=4, p=5, g=2, n=3, dtype=torch.float64):
    l = sum(lengths)
    arguments = {
        "x": randn(1, l, h, p, dtype=dtype),
        "dt": randn(1, l, h, dtype=dtype),
        "A": -randn(h, dtype=dtype).exp(),
        "B": randn(1, l, g, n, dtype=dtype),
        "C": randn(1, l, g, n, dtype=dtype),
        "dt_bias": randn(h, dtype=dtype),
        "initial_states": randn(1, h, p, n, dtype=dtype),
    }
    rest = {"chunk_size": 4, "dt_softplus": True, "dt_limit": (0.05, 2.0)}
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return arguments, rest, seq_idx, cu_seqlens


@every_backend
@pytest.mark.parametrize("lengths", [(1,), (5, 9, 1, 70), (3, 0, 4)])
def test_varlen_states_are_those_of_the_sequences_alone(backend, lengths):
    arguments, rest, seq_idx, cu_seqlens = packed_arguments(lengths)
    single = {k: t.float() for k, t in arguments.items()}
    with ops.backend(backend):
        y, last, states = ops.mamba_chunk_scan_combined(
            **single,
            **rest,
            seq_idx=seq_idx,
            cu_seqlens=cu_seqlens,
            return_final_states=True,
            return_varlen_states=True,
        )
        plain, plain_last = ops.mamba_chunk_scan_combined(**single, **rest, seq_idx=seq_idx, return_final_states=True)
    assert torch.equal(y, plain) and torch.equal(last, plain_last)
    assert states.shape == (len(lengths), 4, 5, 3) and states.dtype == torch.float32
    first = arguments.pop("initial_states")
    for i, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:])):
        part = {k: t[:, start:end] if t.ndim > 2 else t for k, t in arguments.items()}
        state = first if i == 0 else None
        _, expected = ops.mamba_chunk_scan_combined(**part, **rest, initial_states=state, return_final_states=True)
        torch.testing.assert_close(states[i].double(), expected[0], rtol=1e-4, atol=1e-5)


def test_gradients_through_varlen_states():
    arguments, rest, seq_idx, cu_seqlens = packed_arguments((2, 3), h=2, p=2, g=1, n=2)

    def states(*tensors):
        return ops.mamba_chunk_scan_combined(
            **dict(zip(arguments, tensors)), **rest, seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=True
        )

    assert torch.autograd.gradcheck(states, tuple(t.requires_grad_() for t in arguments.values()))


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_states_come_in_the_type_that_is_asked_for(backend, dtype):
    arguments, rest, seq_idx, cu_seqlens = packed_arguments((3, 4), dtype=torch.float32)
    with ops.backend(backend):
        y, last, states = ops.mamba_chunk_scan_combined(
            **arguments,
            **rest,
            cu_seqlens=cu_seqlens,
            return_final_states=True,
            return_varlen_states=True,
            state_dtype=dtype,
        )
    assert y.dtype == torch.float32 and last.dtype == states.dtype == dtype


@pytest.mark.parametrize(
    "change, message",
    [
        ({"return_varlen_states": True}, "return_varlen_states wants cu_seqlens"),
        ({"cu_seqlens": True}, "cu_seqlens is True.*by name"),
        ({"return_varlen_states": True, "cu_seqlens": torch.tensor([0.0, 7.0])}, "cu_seqlens has dtype torch.float32"),
        ({"return_varlen_states": True, "cu_seqlens": torch.tensor([0, 8])}, r"cu_seqlens .*from 0 to at most 7"),
        ({"return_varlen_states": True, "cu_seqlens": torch.tensor([0, 5, 3])}, "cu_seqlens .*never falling"),
        ({"state_dtype": torch.int32}, "state_dtype is torch.int32"),
    ],
)
def test_bad_arguments_of_the_scan_are_named(change, message):
    arguments, rest, _, _ = packed_arguments((3, 4))
    with pytest.raises(ValueError, match=message):
        ops.mamba_chunk_scan_combined(**arguments, **rest | change)


def test_varlen_states_want_one_packed_batch():
    arguments, rest, _, cu_seqlens = packed_arguments((3, 4))
    two = {k: t.expand(2, *t.shape[1:]) if t.ndim > 1 else t for k, t in arguments.items()}
    with pytest.raises(ValueError, match="x has 2 batch elements, expected 1"):
        ops.mamba_chunk_scan_combined(**two, **rest, cu_seqlens=cu_seqlens, return_varlen_states=True)
