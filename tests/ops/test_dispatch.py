"""How a backend is chosen, and what the user reads."""

import os
import warnings
from typing import NamedTuple

import forked
import pytest
import torch
from paths import ROOT

from ssmzoo.ops import BACKENDS, BackendError, backend, backend_table, chosen_backend
from ssmzoo.ops.dispatch import OPERATORS, op
from ssmzoo.ops.library import Differentiable, Kernel


def why_not_fast(a):
    return "only twice" if a.times != 2 else None


@pytest.fixture
def double():
    """An operator with a reference, a picky backend, one for CUDA and one whose library is missing."""

    def check(a):
        if a.times < 0:
            raise ValueError(f"times is {a.times}, expected 0 or more")

    @op(check=check)
    def double(x, times=1):
        """x 2^times"""
        return x * 2**times

    double.register("c", unsupported=why_not_fast)(lambda a: a.x * 4)
    double.register("triton", device="cuda")(lambda a: a.x)
    double.register("mamba_ssm", device="cuda", missing="mamba-ssm is not installed")(lambda a: a.x)
    yield double
    del OPERATORS["double"]


def test_first_willing_backend_serves(double):
    x = torch.ones(2)
    assert chosen_backend(double, x, times=2) == "c"
    assert chosen_backend(double, x, 3) == "reference"
    assert double(x, 3).tolist() == [8, 8]
    assert double.__doc__ == "x 2^times"


def test_override_is_honoured_or_explained(double):
    x = torch.ones(2)
    with backend("c"):
        assert double(x, 2).tolist() == [4, 4]
        with pytest.raises(BackendError) as error, backend("triton"):
            double(x)
        with backend(None):
            assert double(x).tolist() == [2, 2]
    for line in (
        "'triton' was asked for",
        "mamba_ssm: mamba-ssm is not installed",
        "triton: needs cuda tensors, got cpu",
        "c: only twice",
        "torch: no torch kernel",
        "reference: available",
    ):
        assert line in str(error.value)
    with pytest.raises(BackendError, match="unknown backend 'torhc'"), backend("torhc"):
        pass
    assert chosen_backend(double, x) == "reference"  # the choice ended with its block


def test_bad_arguments_are_refused_before_the_choice(double):
    with pytest.raises(ValueError, match="times is -1"):
        double(torch.ones(1), -1)
    with pytest.raises(TypeError, match=r"double\(\) got an unexpected keyword argument 'tims'"):
        double(torch.ones(1), tims=2)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        double.register("gpu")
    with pytest.raises(TypeError, match=r"double\(\) takes 2 positional arguments but 3 were given"):
        double(torch.ones(1), 2, 3)


@pytest.mark.parametrize("former, name", [("native", "c"), ("cuda", "mamba_ssm")])
def test_former_names_are_understood(double, former, name):
    with pytest.warns(DeprecationWarning, match=f"'{former}' is called '{name}' now"), backend(former):
        with pytest.raises(BackendError, match=f"'{name}' was asked for"):
            double(torch.ones(2), 1)


def test_choice_is_traced_through(double):
    compiled = torch.compile(lambda x: double(x, 2) + double(x, 1), fullgraph=True, backend="eager")
    x = torch.ones(2)
    assert compiled(x).tolist() == [6, 6]
    with backend("reference"):
        assert compiled(x).tolist() == [6, 6]


def test_table_lists_every_operator_on_every_backend(double):
    rows = {(r.operator, r.backend): r for r in backend_table()}
    assert len(rows) == len(OPERATORS) * len(BACKENDS)
    assert (
        rows["double", "mamba_ssm"].reason == "mamba-ssm is not installed" and not rows["double", "mamba_ssm"].available
    )
    assert rows["double", "torch"].reason == "no torch kernel for this operator"
    assert all(rows[name, "reference"].available for name in OPERATORS)
    assert torch.cuda.is_available() or rows["double", "triton"].reason == "no CUDA device"


CHOICES = """
import os, torch
for name, value, expected in (
    ("SSMZOO_BACKEND", "reference", "reference"),
    ("SSMZOO_BACKEND", "torhc", "asked for"),
    ("SSMZOO_NATIVE", "off", "torch"),
):
    if os.fork() == 0:  # a process that has imported torch alone
        os.environ[name] = value
        try:
            from ssmzoo.ops import chosen_backend, selective_scan_fn as f
            x = torch.ones(1, 2, 3)
            said = chosen_backend(f, x, x, -x[0, :, :1], x[:, :1], x[:, :1])
        except Exception as error:
            said = str(error)
        print(name, value, said, flush=True)
        os._exit(expected not in said)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_environment_chooses():
    status, printed = forked.run("-c", CHOICES, cwd=ROOT, env=os.environ)
    assert status == 0, printed


def test_observers_see_every_call_and_joined_operators_run_in_parts():
    from ssmzoo.ops import OPERATORS, chosen_backend, observe, spatial_scan

    seen = []

    def look(call, *args, **kwargs):
        seen.append("outer")
        return call(*args, **kwargs)

    def inner(call, *args, **kwargs):
        seen.append("inner")
        return call(*args, **kwargs)

    u, steps, w = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 4), torch.randn(8, 2)
    arguments = u, steps, w, torch.zeros(8), -torch.ones(8, 1), torch.ones(8), None, None
    expected = spatial_scan(*arguments)
    with observe(selective_scan_fn=look), observe(selective_scan_fn=inner):
        torch.testing.assert_close(spatial_scan(*arguments), expected)
    assert seen == ["inner", "outer"]
    spatial_scan(*arguments)
    assert len(seen) == 2, "observation ends with its block"
    with pytest.raises(ValueError, match="no operator 'selectiv_scan'"), observe(selectiv_scan=look):
        pass
    assert "spatial_scan" in OPERATORS and chosen_backend(spatial_scan, *arguments)


class CompilationError(Exception):
    """As Triton's."""


CompilationError.__module__ = "triton.compiler.errors"


def test_a_kernel_that_cannot_be_compiled_is_replaced_by_the_next_backend_and_told_once():
    def fails(a):
        raise CompilationError("at 3:4:\n  y = x\nptxas fatal: Value 'sm_61' is not defined for option 'gpu-name'")

    @op
    def doubled(x: torch.Tensor):
        return 2 * x

    try:
        doubled.register("triton", device="cpu")(fails)
        doubled.register("torch")(lambda a: a.x + a.x)
        with backend("triton"), pytest.raises(BackendError, match="was asked for; Triton cannot run .*sm_61"):
            doubled(torch.ones(2))
        with pytest.warns(RuntimeWarning, match=r"doubled: Triton cannot run .*CompilationError: ptxas"):
            assert torch.equal(doubled(torch.ones(2)), torch.full((2,), 2.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            doubled(torch.ones(3))
            assert chosen_backend(doubled, torch.ones(2)) == "torch"
        row = next(r for r in backend_table() if (r.operator, r.backend) == ("doubled", "triton"))
        assert not row.available and "sm_61" in row.reason
        doubled.register("triton", device="cpu")(lambda a: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # any other mistake is no reason to go on
            doubled(torch.ones(2))
    finally:
        del OPERATORS["doubled"]


def test_a_gradient_that_cannot_be_compiled_says_what_to_do():
    class Inputs(NamedTuple):
        x: torch.Tensor

    def fails(a, saved, dy):
        raise CompilationError("out of resources: shared memory")

    kernel = Differentiable("failing", Inputs)
    kernel.kernels["triton"] = Kernel(lambda a, save: ((a.x * 2,), None), fails)
    y = kernel(Inputs(torch.ones(2, requires_grad=True)), "triton")
    with pytest.raises(RuntimeError, match="the gradient of failing: Triton cannot run .*SSMZOO_BACKEND=torch"):
        y.sum().backward()
