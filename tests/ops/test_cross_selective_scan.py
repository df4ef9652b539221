"""cross_selective_scan: the fused kernel against the operators one after another, values and gradients."""

import pytest
import torch
from against_reference import native as needs_kernels

from ssmzoo.ops import backend, chosen_backend, cross_selective_scan
from ssmzoo.released.golden import relative_error

SHAPES = [(2, 38, 5, 7, 8, 2), (1, 72, 9, 14, 10, 4), (2, 16, 7, 3, 1, 1), (1, 5, 1, 1, 3, 2), (3, 130, 6, 6, 16, 5)]


def arguments(b, e, h, w, n, r, dtype=torch.float64):
    """x, x_proj, dt_proj, dt_bias, A, D"""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    given = (
        normal(b, e, h, w),
        normal(4, r + 2 * n, e) / e**0.5,
        normal(4, e, r) / r**0.5,
        0.5 * normal(4, e) - 2,
        -8 * torch.rand(4 * e, n, generator=generator, dtype=torch.float64),
        normal(4 * e),
    )
    return [t.to(dtype) for t in given]


def value_and_gradients(name, given, scans):
    given = [t.detach().clone().requires_grad_() for t in given]
    with backend(name):
        y = cross_selective_scan(*given, scans)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(t.grad for t in given)]


def close(found, expected):
    for f, e in zip(found, expected):
        assert (f.double() - e.double()).norm() <= 2e-6 * e.double().norm() + 1e-6


@needs_kernels
@pytest.mark.parametrize("scans", ["cross", "unidirectional", "bidirectional"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_equals_the_operators_in_float64(shape, scans):
    expected = value_and_gradients("torch", arguments(*shape), scans)
    close(value_and_gradients("c", arguments(*shape, dtype=torch.float32), scans), expected)


@pytest.mark.parametrize("name", ["torch", pytest.param("c", marks=needs_kernels)])
def test_every_backend_equals_the_definition(name):
    given = arguments(1, 6, 3, 4, 2, 1, torch.float32)
    close(value_and_gradients(name, given, "cross"), value_and_gradients("reference", given, "cross"))


@needs_kernels
def test_layout_threads_and_saved_states_change_nothing():
    given = arguments(2, 40, 9, 8, 4, 3, torch.float32)
    assert chosen_backend(cross_selective_scan, *given) == "c"
    with torch.no_grad():
        first = cross_selective_scan(*given)
        last = cross_selective_scan(given[0].to(memory_format=torch.channels_last), *given[1:])
    assert torch.equal(first, last)
    assert torch.equal(first, cross_selective_scan(*[t.requires_grad_() for t in given]).detach())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        close(value_and_gradients("c", given, "cross"), value_and_gradients("torch", given, "cross"))
    finally:
        torch.set_num_threads(threads)


@needs_kernels
def test_half_precision_batches_of_none_and_double_backward():
    given = arguments(1, 16, 4, 4, 2, 1, torch.bfloat16)
    y, exact = cross_selective_scan(*given), cross_selective_scan.reference(*(t.double() for t in given))
    assert y.dtype == torch.bfloat16 and y.shape == (1, 4, 4, 16)
    with backend("torch"):  # which rounds on the way from part to part
        composed = relative_error(cross_selective_scan(*given), exact)
    assert relative_error(y, exact) <= composed
    assert cross_selective_scan(given[0][:0], *given[1:]).shape == (0, 4, 4, 16)
    given = [t.float().requires_grad_() for t in given]
    (grad,) = torch.autograd.grad(cross_selective_scan(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@needs_kernels
def test_it_is_registered_with_torch():
    given = [t.requires_grad_() for t in arguments(1, 8, 3, 4, 2, 1, torch.float32)]
    compiled = torch.compile(cross_selective_scan, fullgraph=True, backend="aot_eager")
    close([compiled(*given).detach()], [cross_selective_scan(*given).detach()])


def test_bad_arguments_are_refused_in_words():
    given = arguments(1, 6, 3, 4, 2, 1, torch.float32)
    with pytest.raises(ValueError, match=r"D has shape \(23,\), expected \(4e=24\)"):
        cross_selective_scan(*given[:5], given[5][:-1])
    with pytest.raises(ValueError, match="expected one of cross"):
        cross_selective_scan(*given, scans="diagonal")
