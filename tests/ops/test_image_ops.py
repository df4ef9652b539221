"""The joined operators of the image models against their references, on every backend that serves."""

import pytest
import torch

import ssmzoo.ops as ops
from ssmzoo.models.spatial_mamba import StructureAwareSSM
from ssmzoo.ops.linear_act.c import MISSING
from ssmzoo.released.golden import relative_error


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def scan_arguments(b, h, w, e, r, dtype=torch.float32):
    return (
        torch.randn(b, h, w, e, dtype=dtype),
        torch.randn(b, h, w, r + 2, dtype=dtype),
        0.3 * torch.randn(e, r),
        torch.randn(e) - 2,
        -torch.rand(e, 1) - 0.1,
        torch.randn(e),
        tuple(torch.randn(e, 1, 3, 3) for _ in range(3)),
        torch.randn(3),
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1, 5, 1), (2, 3, 7, 20, 3), (1, 12, 4, 33, 2), (2, 13, 2, 16, 4)])
def test_spatial_scan(sizes):
    arguments = scan_arguments(*sizes)
    expected = ops.spatial_scan.reference(*arguments)
    with torch.no_grad():
        assert ops.chosen_backend(ops.spatial_scan, *arguments) in ("c", "torch")
        torch.testing.assert_close(ops.spatial_scan(*arguments), expected, rtol=1e-4, atol=1e-5)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.testing.assert_close(ops.spatial_scan(*arguments), expected, rtol=1e-4, atol=1e-5)
    torch.set_num_threads(1)
    with ops.backend("torch"):
        torch.testing.assert_close(ops.spatial_scan(*arguments), expected, rtol=1e-4, atol=1e-5)
    half = scan_arguments(*sizes, dtype=torch.bfloat16)
    exact = ops.spatial_scan.reference(*(t.double() if torch.is_tensor(t) else [k.double() for k in t] for t in half))
    eps = torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        for backend in (None, "torch"):  # in parts, the states are rounded to bfloat16 on their way: once
            with ops.backend(backend):
                assert relative_error(ops.spatial_scan(*half), exact) < eps


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 5, 1), (2, 3, 7, 20, 3), (1, 12, 4, 33, 2), (2, 13, 2, 16, 4), (1, 1, 9, 40, 3), (2, 9, 8, 18, 9)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_spatial_scan(sizes, threads):
    """Of all ten arguments, beside the operators that are joined, in double precision."""

    def gradients(dtype):
        given = [t.detach().to(dtype).requires_grad_() for t in (*arguments[:6], *arguments[6], arguments[7])]
        y = ops.spatial_scan(*given[:6], given[6:9], given[9])
        return torch.autograd.grad((y * weight.to(dtype)).sum(), given)

    torch.set_num_threads(threads)
    arguments, weight = scan_arguments(*sizes), torch.randn(sizes[:4])
    found = gradients(torch.float32)
    with ops.backend("torch"):
        expected = gradients(torch.float64)
    torch.set_num_threads(1)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm().clamp(min=1e-3)


def test_spatial_scan_traced_twice_derived_unfused_or_misused():
    arguments = scan_arguments(1, 3, 4, 6, 2)
    arguments[0].requires_grad_()
    y = torch.compile(lambda u: ops.spatial_scan(u, *arguments[1:]), fullgraph=True, backend="aot_eager")(arguments[0])
    torch.testing.assert_close(y, ops.spatial_scan.reference(*arguments), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(ops.spatial_scan(*arguments).square().sum(), arguments[0], create_graph=True)
    if ops.chosen_backend(ops.spatial_scan, *arguments) == "c":
        with pytest.raises(RuntimeError, match="spatial_scan has no double backward"):
            grad.sum().backward()
    unfused = (*arguments[:6], None, None)
    torch.testing.assert_close(ops.spatial_scan(*unfused), ops.spatial_scan.reference(*unfused), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="steps has shape"):
        ops.spatial_scan(arguments[0], arguments[1][..., :-1], *arguments[2:])


def test_training_and_inference_of_the_mixer_agree():
    mixer, x = StructureAwareSSM(24).eval(), torch.randn(2, 5, 6, 24)
    with torch.no_grad():
        quick = mixer(x)
    torch.testing.assert_close(quick, mixer(x), rtol=1e-4, atol=1e-5)


KERNELS = None if MISSING else "c"  # asked for by name: small products are left to torch


@pytest.mark.parametrize("act", [None, "gelu", "relu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("asked", sorted({KERNELS, None}, key=str))
def test_linear_act(act, bias, asked):
    x, weight, b = torch.randn(3, 7, 2, 10)[:, ::2], torch.randn(6, 10), torch.randn(6) if bias else None
    expected = ops.linear_act.reference(x, weight, b, act)
    with ops.backend(asked):
        torch.testing.assert_close(ops.linear_act(x, weight, b, act), expected, rtol=1e-5, atol=1e-5)
    with ops.backend("torch"):
        torch.testing.assert_close(ops.linear_act(x, weight, b, act), expected, rtol=1e-5, atol=1e-5)
    given = [t.requires_grad_() for t in (x, weight, b) if t is not None]
    with ops.backend(asked):
        found = torch.autograd.grad(ops.linear_act(x, weight, b, act).square().sum(), given, create_graph=True)
    expected = torch.autograd.grad(ops.linear_act.reference(x, weight, b, act).square().sum(), given, create_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    twice, wanted = (torch.autograd.grad(g[1].square().sum(), x)[0] for g in (found, expected))
    torch.testing.assert_close(twice, wanted, rtol=1e-3, atol=1e-3)
    with ops.backend(asked):
        (expanded,) = torch.autograd.grad(ops.linear_act(x, weight, b).sum(), x)
    torch.testing.assert_close(expanded, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu"):
        assert ops.linear_act(x, weight, b, act).dtype == torch.bfloat16


@pytest.mark.parametrize("act", [None, "gelu", "relu", "silu"])
@pytest.mark.parametrize("rows,d,e", [(1, 16, 1), (5, 33, 70), (300, 64, 19), (2100, 80, 210)])
def test_gradients_of_linear_act(act, rows, d, e):
    x, weight, b = (torch.randn(s, dtype=torch.float64) for s in ((rows, d), (e, d), (e,)))
    dy, given = torch.randn(rows, e, dtype=torch.float64), [t.requires_grad_() for t in (x, weight, b)]
    expected = torch.autograd.grad(ops.linear_act(*given, act), given, dy)
    single = [t.detach().float().requires_grad_() for t in given]
    assert ops.chosen_backend(ops.linear_act, *given, act) == "torch"
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with ops.backend(KERNELS):
            found = torch.autograd.grad(ops.linear_act(*single, act), single, dy.float())
        for one, other in zip(found, expected):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    torch.set_num_threads(1)
    without = single[0].detach()
    with ops.backend(KERNELS):
        (weight_only,) = torch.autograd.grad(ops.linear_act(without, single[1], None, act), single[1], dy.float())
    with ops.backend("torch"):
        (again,) = torch.autograd.grad(ops.linear_act(without, single[1], None, act), single[1], dy.float())
    torch.testing.assert_close(weight_only, again, rtol=1e-4, atol=1e-4)


def test_linear_act_says_what_is_wrong():
    with pytest.raises(ValueError, match="act = 'tanh', expected one of None, 'gelu'"):
        ops.linear_act(torch.randn(2, 3), torch.randn(4, 3), act="tanh")
    with pytest.raises(ValueError, match=r"weight \(4, 5\)"):
        ops.linear_act(torch.randn(2, 3), torch.randn(4, 5))
    assert ops.linear_act(torch.randn(0, 3), torch.randn(4, 3)).shape == (0, 4)


@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
def test_small_products_are_left_to_torch_unless_asked_for():
    small, large, few = torch.randn(16, 16), torch.randn(512, 128), torch.randn(4, 16)
    assert ops.chosen_backend(ops.linear_act, small, torch.randn(16, 16)) == "torch"
    assert ops.chosen_backend(ops.linear_act, large, torch.randn(64, 128)) == "c"
    assert ops.chosen_backend(ops.linear_act, few, torch.randn(16, 16)) == "c"  # as decoding multiplies them
    assert ops.chosen_backend(ops.linear_act, few, torch.randn(16, 16).requires_grad_()) == "torch"
    with ops.backend("c"):
        assert ops.chosen_backend(ops.linear_act, small, torch.randn(16, 16)) == "c"
