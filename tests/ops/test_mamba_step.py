"""The one-token operator of Mamba: every backend against the definition, and against the sequence form."""

import pytest
import torch
from against_reference import native

import ssmzoo.ops as ops
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.ops.dispatch import BackendError
from ssmzoo.ops.mamba_step.torch import by_updates

SHAPES = [
    dict(d_model=20, d_state=4, d_conv=3, bias=True),
    dict(d_model=33, conv_bias=False),
    dict(d_model=16),
    dict(d_model=24, d_state=19, d_conv=1, expand=1.5),
    dict(d_model=1, d_state=1, expand=1),
]


def arguments(b=2, projections=True, **shape):
    mixer = Mamba(**shape).requires_grad_(False)
    for p in mixer.parameters():
        p += 0.2 * torch.randn_like(p)
    e, n, k = mixer.d_inner, mixer.d_state, mixer.d_conv
    weights = [
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.x_proj.weight,
        mixer.dt_proj.weight,
        mixer.dt_proj.bias,
        mixer.A_log,
        mixer.D,
    ]
    u = torch.randn(b, mixer.d_model if projections else 2 * e)
    if projections:
        weights += [mixer.in_proj.weight, mixer.in_proj.bias, mixer.out_proj.weight, mixer.out_proj.bias]
    return mixer, [u, torch.randn(b, e, k), torch.randn(b, e, n), *weights]


def poison(monkeypatch):
    """A kernel that forgets to write an element returns NaN."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))


@native
@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("projections", [True, False])
def test_c_is_the_definition(shape, projections, monkeypatch):
    _, args = arguments(projections=projections, **shape)
    expected = ops.mamba_step.reference(*args)
    poison(monkeypatch)
    with ops.backend("c"):
        for got, e in zip(ops.mamba_step(*args), expected):
            torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)


@native
@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "b, shape", [(1, dict(d_model=800)), (8, dict(d_model=750, bias=True)), (9, dict(d_model=37))], ids=str
)
def test_c_serves_wide_layers_batches_and_threads(b, shape, threads, monkeypatch):
    """Weights are read once whatever the batch; against float64, with less than the rounding of fp32 sums."""
    _, args = arguments(b=b, **shape)
    args[0][0] *= 100
    expected = ops.mamba_step.reference(*[None if a is None else a.double() for a in args])
    poison(monkeypatch)
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        with ops.backend("c"):
            for got, e in zip(ops.mamba_step(*args), expected):
                assert (got.double() - e).norm() <= 1e-6 * e.norm()
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_two_update_operators_are_the_definition(shape):
    _, args = arguments(**shape)
    before = [a.clone() for a in args if a is not None]
    for got, e in zip(by_updates(ops.mamba_step.Arguments(*args)), ops.mamba_step.reference(*args)):
        torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip([a for a in args if a is not None], before))


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_are_the_sequence(shape):
    mixer, _ = arguments(**shape)
    x = torch.randn(3, 6, shape["d_model"])
    expected, last = mixer(x)
    state, ys = None, []
    for token in x.split(1, dim=1):
        y, state = mixer(token, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.ssm, last.ssm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.conv, last.conv)


@native
def test_c_says_what_it_does_not_serve():
    _, args = arguments(d_model=16)
    with ops.backend("c"):
        with pytest.raises(BackendError, match="without gradients"):
            ops.mamba_step(*args)
        many = [a.repeat(40, *[1] * (a.ndim - 1)) if i < 3 else a for i, a in enumerate(args)]
        with torch.no_grad(), pytest.raises(BackendError, match="up to 64 sequences, got 80"):
            ops.mamba_step(*many)
        with torch.no_grad(), pytest.raises(BackendError, match="float32"):
            ops.mamba_step(*[None if a is None else a.double() for a in args])
    with torch.no_grad():
        assert ops.chosen_backend(ops.mamba_step, *[None if a is None else a.double() for a in args]) == "torch"
