"""gated_layer_norm: values and gradients against float64, on every backend of a CPU."""

import pytest
import torch
from against_reference import BACKENDS, native

from ssmzoo import ops
from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.released.golden import relative_error


def inputs(*shape):
    torch.manual_seed(0)
    return [torch.randn(shape) + 3, torch.randn(shape), torch.rand(shape[-1]), torch.randn(shape[-1])]


def run(backend, values, dtype=torch.float32):
    values = [v.detach().to(dtype).requires_grad_() for v in values]
    with ops.backend(backend):
        y = ops.gated_layer_norm(*values)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y * weights.to(dtype)).sum(), values)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(3, 37), (2, 5, 13, 64), (4, 5), (7,), (130, 19)], ids=str)
def test_against_reference(backend, threads, shape):
    values = inputs(*shape)
    torch.set_num_threads(threads)
    found = run(backend, values)
    torch.set_num_threads(1)
    errors = [relative_error(a, b) for a, b in zip(found, run("reference", values, torch.float64))]
    assert errors[0] < 1e-6 and max(errors[1:]) < 1e-5, errors


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_constant_rows_and_large_gates(backend):
    """One channel, or channels alike, are normalised to zero: the bias is what the gate lets through."""
    z = torch.tensor([[-200.0], [-1.0], [0.0], [200.0]])
    with ops.backend(backend):
        y = ops.gated_layer_norm(torch.randn(4, 1), z, torch.ones(1), torch.full((1,), 2.0))
        torch.testing.assert_close(y, 2 * torch.nn.functional.silu(z))
        assert torch.equal(
            ops.gated_layer_norm(torch.full((4, 20), 5.0), z.expand(4, 20), *torch.zeros(2, 20)), torch.zeros(4, 20)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_no_gradient(backend):
    x, _, weight, bias = inputs(2, 6, 4, 24)
    wide = torch.randn(2, 6, 4, 48, requires_grad=True)
    strided = torch.randn(2, 24, 6, 4).permute(0, 2, 3, 1)
    expected = run("reference", [x, wide.chunk(2, dim=-1)[1], weight, bias], torch.float64)
    with ops.backend(backend):
        y = ops.gated_layer_norm(x, wide.chunk(2, dim=-1)[1], weight, bias)
        assert relative_error(y, expected[0]) < 1e-6
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        (dwide,) = torch.autograd.grad((y * weights).sum(), wide)
        assert relative_error(dwide[..., 24:], expected[2]) < 1e-5 and not dwide[..., :24].any()
        with torch.no_grad():
            torch.testing.assert_close(
                ops.gated_layer_norm(strided, strided, weight, bias),
                ops.gated_layer_norm(strided.contiguous(), strided.contiguous(), weight, bias),
            )


@native
def test_second_derivatives_and_who_serves():
    given = [v.requires_grad_() for v in inputs(3, 6)]
    for values in (given, [v.detach() for v in given]):
        assert ops.chosen_backend(ops.gated_layer_norm, *values) == "c"
    second = []
    for backend in ("c", "torch"):
        with ops.backend(backend):
            y = ops.gated_layer_norm(given[0], given[1], given[2], given[3].detach())
        grads = torch.autograd.grad(y.square().sum(), given[:3], create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in grads), given[:3]))
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-4)
    half = [v.detach().bfloat16() for v in given]
    assert ops.chosen_backend(ops.gated_layer_norm, *half) == "torch"
    exact = ops.gated_layer_norm(*(v.double() for v in half))
    rounding = torch.finfo(torch.bfloat16).eps / 2  # of the norm, of the gate and of their product
    assert relative_error(ops.gated_layer_norm(*half), exact) < 3 * rounding
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.chosen_backend(ops.gated_layer_norm, *given) == "torch"
    assert ops.chosen_backend(ops.gated_layer_norm, *(v.detach()[..., :0] for v in given)) == "torch"


@pytest.mark.parametrize("out_act, joined", [(None, True), ("gelu", False)])
def test_the_mixer_is_what_it_was(out_act, joined):
    torch.manual_seed(0)
    mixer, x = SS2D(8, d_state=2, out_norm=f"layer+{out_act}" if out_act else "layer"), torch.randn(1, 3, 4, 8)
    y, z = torch.randn(1, 3, 4, 16), torch.randn(1, 3, 4, 16)
    assert mixer.joined == joined and type(mixer.out_norm) is torch.nn.LayerNorm
    plain = torch.nn.functional.layer_norm(y, (16,), mixer.out_norm.weight, mixer.out_norm.bias)
    torch.testing.assert_close(mixer.norm_and_gate(y, z), mixer.out_act(plain) * torch.nn.functional.silu(z))
    assert mixer(x).shape == x.shape


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), z \(2, 4\)"):
        ops.gated_layer_norm(torch.ones(2, 5), torch.ones(2, 4), torch.ones(5), torch.ones(5))
