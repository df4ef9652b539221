"""torch.func and forward-mode derivatives: every operator has the derivatives that reverse mode finds, or refuses."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from toy_operators import EXAMPLES, in_order

from ssmzoo import ops

BATCH = 3  # samples of vmap


@pytest.fixture(params=EXAMPLES, autouse=True)
def case(request):
    torch.manual_seed(0)
    return in_order(*EXAMPLES[request.param]())


def loss_of(function):
    """A scalar function that weighs every element of every result differently."""

    def loss(*tensors):
        results = function(*tensors)
        results = results if isinstance(results, tuple) else (results,)
        return sum(((r + 0.1 * r * r) * (1.0 + torch.arange(r.numel()).view(r.shape) % 7)).sum() for r in results)

    return loss


def gradients(loss, tensors, backend=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with ops.backend(backend):
        return torch.autograd.grad(loss(*leaves), leaves, **options), leaves


def close(got, expected):
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_every_operator_has_an_example():
    assert {title.partition(":")[0] for title in EXAMPLES} == set(ops.OPERATORS)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_forward_mode_equals_reverse_mode(case, backend):
    function, tensors, _ = case
    loss = loss_of(function)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    expected, _ = gradients(loss, tensors)
    with ops.backend(backend):
        by_transform = jvp(loss, tensors, tangents)[1]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, v) for t, v in zip(tensors, tangents)]
            by_level = forward_ad.unpack_dual(loss(*duals)).tangent
    right = sum((g * v).sum() for g, v in zip(expected, tangents))
    assert right.abs() > 1e-6
    close((by_transform, by_level), (right, right))


def test_gradients_per_sample(case):
    function, tensors, again = case
    loss, every = loss_of(function), tuple(range(len(tensors)))
    samples = [again() for _ in range(BATCH)]
    got = vmap(grad(loss, every))(*(torch.stack(t) for t in zip(*samples)))
    for i, sample in enumerate(samples):
        close([g[i] for g in got], gradients(loss, sample)[0])


def test_hessian_vector_product(case):
    function, tensors, _ = case
    loss, every = loss_of(function), tuple(range(len(tensors)))
    tangents = tuple(torch.randn_like(t) for t in tensors)
    forward_over_reverse = jvp(grad(loss, every), tensors, tangents)[1]
    first, leaves = gradients(loss, tensors, "reference", create_graph=True)
    product = sum((g * v).sum() for g, v in zip(first, tangents))
    expected = torch.autograd.grad(product, leaves, allow_unused=True, materialize_grads=True)
    close(forward_over_reverse, expected)


def test_jacobians_and_hessian(case):
    function, tensors, _ = case
    x = tensors[0]

    def first(x):
        results = function(x, *tensors[1:])
        return results[0] if isinstance(results, tuple) else results

    forward, reverse = jacfwd(first)(x), jacrev(first)(x)
    close([forward], [reverse])
    assert forward.shape == (*first(x).shape, *x.shape)
    assert hessian(lambda x: first(x).square().sum())(x).isfinite().all()


@pytest.mark.parametrize("backend", [b for b in ops.BACKENDS if b not in ("torch", "reference")])
def test_kernels_refuse_and_name_a_backend_that_serves(case, backend):
    function, tensors, _ = case
    with ops.backend(backend), pytest.raises(ops.BackendError, match=r"torch: available"):
        jvp(function, tensors, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # on the kernels, and on torch
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Batching rule not implemented")
def test_batched_gradients(case, dtype):
    """torch.autograd.grad(is_grads_batched=True), as torch.autograd.functional.jacobian(vectorize=True) calls it."""
    function, tensors, _ = case
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    results = function(*leaves)
    result = results[0] if isinstance(results, tuple) else results
    given = torch.randn(2, *result.shape, dtype=result.dtype)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    got = torch.autograd.grad(result, leaves, given, is_grads_batched=True, **options)
    for i in range(2):
        expected = torch.autograd.grad(result, leaves, given[i], **options)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)
