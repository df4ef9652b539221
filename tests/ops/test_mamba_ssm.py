"""mamba-ssm and causal-conv1d behind the operators, played by stand-ins: a working install, and broken ones."""

import importlib.util
import os

import forked
import pytest
from paths import ROOT

SETUP = '''
import builtins, importlib.abc, importlib.machinery, sys, types
import torch

CALLS, BROKEN = [], {broken!r}

class Install(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that exist, whose modules work or raise as an install for another PyTorch does."""
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return types.ModuleType(spec.name)
    def exec_module(self, module):
        CALLS.append("import " + module.__name__)
        if BROKEN and module.__name__ in ("mamba_ssm.ops.selective_scan_interface", "causal_conv1d"):
            kind, _, message = BROKEN[module.__name__.partition(".")[0]].partition(": ")
            raise getattr(builtins, kind)(message)
        from ssmzoo import ops
        def their(name, real):
            def function(*args, **kwargs):
                CALLS.append(name)
                with ops.backend("reference"):
                    return real(*args, **kwargs)
            setattr(module, name, function)
        their("selective_scan_fn", ops.selective_scan_fn)
        their("selective_state_update", ops.selective_state_update)
        their("mamba_chunk_scan_combined", ops.mamba_chunk_scan_combined)
        their("causal_conv1d_fn", ops.causal_conv1d_fn)
        their("causal_conv1d_update", ops.causal_conv1d_update)

sys.meta_path.insert(0, Install())
import ssmzoo.ops.dispatch as dispatch
dispatch._device_type = lambda a: "cuda"  # these CPU tensors stand for CUDA tensors
from ssmzoo import ops
from ssmzoo.ops import chosen_backend
for operator in dispatch.OPERATORS.values():
    operator.backends.pop("triton", None)
assert CALLS == [], CALLS  # found without being imported

rng = torch.Generator().manual_seed(0)
def r(*shape):
    return torch.randn(*shape, generator=rng)
scan = dict(u=r(2, 8, 5), delta=r(2, 8, 5), A=-r(8, 4).exp(), B=r(2, 4, 5), C=r(2, 4, 5), D=r(8), z=r(2, 8, 5),
            delta_softplus=True)
conv = dict(x=r(2, 8, 5), weight=r(8, 4), bias=r(8), activation="silu")
last = conv | dict(x=r(2, 5, 8).transpose(1, 2))
ssd = dict(x=r(2, 5, 4, 8), dt=r(2, 5, 4), A=-r(4).exp(), B=r(2, 5, 1, 4), C=r(2, 5, 1, 4), chunk_size=20,
           dt_softplus=True)
step = dict(state=r(2, 8, 4), x=r(2, 8), dt=r(2, 8), A=-r(8, 4).exp(), B=r(2, 4), C=r(2, 4), dt_softplus=True)
seq_idx = torch.tensor([[3, 3, 4, 3, 3], [-1, 0, 0, -1, 1]])
def same(got, expected):
    torch.testing.assert_close(got, expected)
def why(function, call):
    return function.backends["mamba_ssm"].objection(function.Arguments(**call))
'''


def python(body: str, broken: dict[str, str] | None = None) -> str:
    """Output of a process in which the stand-ins work, or raise the error written for their package."""
    code = SETUP.replace("{broken!r}", repr(broken)) + body
    status, printed = forked.run("-c", code, cwd=ROOT, env=os.environ)
    assert status == 0, printed
    return printed


def test_a_working_install_serves_with_the_same_numbers():
    python("""
for function, call, name in ((ops.selective_scan_fn, scan, "selective_scan_fn"),
                             (ops.selective_scan_fn, scan | dict(return_last_state=True), "selective_scan_fn"),
                             (ops.causal_conv1d_fn, conv, "causal_conv1d_fn"),
                             (ops.causal_conv1d_fn, last | dict(seq_idx=seq_idx), "causal_conv1d_fn"),
                             (ops.causal_conv1d_fn, last | dict(initial_states=r(2, 8, 3), return_final_states=True),
                              "causal_conv1d_fn"),
                             (ops.mamba_chunk_scan_combined, ssd | dict(seq_idx=seq_idx, return_final_states=True),
                              "mamba_chunk_scan_combined"),
                             (ops.mamba_chunk_scan_combined,
                              {k: v[:1] if torch.is_tensor(v) and v.ndim > 1 else v for k, v in ssd.items()}
                              | dict(seq_idx=seq_idx[:1], return_final_states=True, return_varlen_states=True,
                                     cu_seqlens=torch.tensor([0, 2, 3, 5]), state_dtype=torch.float64),
                              "mamba_chunk_scan_combined")):
    CALLS.clear()
    got = function(**call)
    assert CALLS[-1] == name, (CALLS, why(function, call))
    with ops.backend("reference"):
        same(got, function(**call))
rows, seen = torch.tensor([4, -1]), torch.tensor([3, 0])
update = conv | dict(x=r(2, 8), conv_state=r(2, 8, 4))
for function, call, buffer in ((ops.selective_state_update, step, "state"),
                               (ops.selective_state_update, step | dict(state=r(5, 8, 4), state_batch_indices=rows),
                                "state"),
                               (ops.causal_conv1d_update, update, "conv_state"),
                               (ops.causal_conv1d_update, update | dict(conv_state=r(5, 8, 4), cache_seqlens=seen,
                                                                        conv_state_indices=rows), "conv_state")):
    mine, theirs = call | {buffer: call[buffer].clone()}, call | {buffer: call[buffer].clone()}
    assert chosen_backend(function, **call) == "mamba_ssm"
    got = function(**theirs)
    with ops.backend("reference"):
        same(got, function(**mine))
    same(theirs[buffer], mine[buffer])
""")


def test_what_they_lack_is_refused_in_words_and_served_by_another():
    python("""
half = lambda t: t.bfloat16()
grad = lambda t: t.clone().requires_grad_()
cases = [(ops.selective_scan_fn, scan | dict(initial_state=r(2, 8, 4)), "no initial_state"),
         (ops.selective_scan_fn, scan | dict(seq_idx=seq_idx), "no seq_idx"),
         (ops.selective_scan_fn, scan | dict(u=grad(scan["u"]), return_last_state=True), "no gradient for the last"),
         (ops.selective_scan_fn, scan | dict(u=half(scan["u"])), "one dtype, got u bfloat16, delta float32"),
         (ops.selective_scan_fn, scan | dict(B=r(2, 2, 4, 5)), "as many groups"),
         (ops.selective_scan_fn, scan | dict(A=-r(8, 300).exp(), B=r(2, 300, 5), C=r(2, 300, 5)), "256 states"),
         (ops.selective_scan_fn, {k: v.double() if torch.is_tensor(v) else v for k, v in scan.items()}, "float64"),
         (ops.causal_conv1d_fn, conv | dict(weight=r(8, 5)), "2 to 4 taps, got 5"),
         (ops.causal_conv1d_fn, conv | dict(seq_idx=seq_idx), "channels-last in multiples of 8"),
         (ops.causal_conv1d_fn, last | dict(seq_idx=seq_idx, initial_states=r(2, 8, 3)), "does not combine"),
         (ops.causal_conv1d_fn, conv | dict(bias=half(conv["bias"])), "one dtype"),
         (ops.selective_state_update, step | dict(x=grad(step["x"])), "no backward"),
         (ops.causal_conv1d_update, conv | dict(x=grad(r(2, 8)), conv_state=r(2, 8, 4)), "no backward"),
         (ops.mamba_chunk_scan_combined, ssd | dict(seq_idx=seq_idx, initial_states=r(2, 4, 8, 4)), "not combine"),
         (ops.mamba_chunk_scan_combined, ssd | dict(x=half(ssd["x"])), "one dtype")]
for function, call, words in cases:
    assert words in why(function, call), (why(function, call), words)
    assert chosen_backend(function, **call) != "mamba_ssm"
compiled = torch.compile(lambda **call: ops.selective_scan_fn(**call), fullgraph=True, backend="eager")
CALLS.clear()
same(compiled(**scan), ops.selective_scan_fn(**scan))
assert CALLS.count("selective_scan_fn") == 1  # not the compiled one
""")


@pytest.mark.parametrize(
    "mamba, conv",
    [
        ("ImportError: libtorch.so: undefined symbol: _ZN3c104cuda", "OSError: cannot open shared object file"),
        ("RuntimeError: built for CUDA 11", "RuntimeError: built for CUDA 11"),
    ],
)
def test_a_broken_install_is_reported_once_and_the_next_backend_serves(mamba, conv):
    output = python(
        """
for _ in range(3):
    assert chosen_backend(ops.selective_scan_fn, **scan) != "mamba_ssm"
    assert chosen_backend(ops.causal_conv1d_fn, **conv) != "mamba_ssm"
print(why(ops.selective_scan_fn, scan))
torch.cuda.is_available = lambda: True
rows = {(row.operator, row.backend): row for row in ops.backend_table()}
print(rows["selective_scan_fn", "mamba_ssm"].reason)
""",
        {"mamba_ssm": mamba, "causal_conv1d": conv},
    )
    for package, words in (("mamba-ssm", mamba), ("causal-conv1d", conv)):
        assert output.count(f"RuntimeWarning: {package} is installed but broken ({words}") == 1, output
    for line in output.splitlines()[-2:]:  # after the warnings: the refusal and the table's row
        assert f"mamba-ssm is installed but broken ({mamba}" in line


def test_without_an_install_the_table_says_so():
    from ssmzoo.ops import backend_table

    rows = {(row.operator, row.backend): row for row in backend_table()}
    for operator, module, package in (
        ("selective_scan_fn", "mamba_ssm", "mamba-ssm"),
        ("causal_conv1d_fn", "causal_conv1d", "causal-conv1d"),
    ):
        said = f"{package} is not installed" in rows[operator, "mamba_ssm"].reason
        assert said == (importlib.util.find_spec(module) is None)


def test_a_function_of_another_release_is_told_by_its_arguments():
    from ssmzoo.ops.mamba_ssm import PARAMETERS, _misfit

    def newest(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False): ...
    def longer(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None): ...
    def reordered(
        u, delta, A, B, C, z=None, D=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ): ...
    def needs_more(x, conv_state, weight, bias, activation, cache_seqlens, pages): ...

    assert _misfit(newest, "selective_scan_fn", "mamba-ssm") is None
    assert _misfit(longer, "causal_conv1d_update", "causal-conv1d") is None
    assert _misfit(print, "selective_scan_fn", "mamba-ssm") is None  # anything may be given
    why = _misfit(reordered, "selective_scan_fn", "mamba-ssm")
    assert "has another selective_scan_fn than ssmzoo knows" in why and "(u, delta, A, B, C, z, D," in why
    assert "pages" in _misfit(needs_more, "causal_conv1d_update", "causal-conv1d")
    assert set(PARAMETERS) == {
        "selective_scan_fn",
        "selective_state_update",
        "mamba_chunk_scan_combined",
        "causal_conv1d_fn",
        "causal_conv1d_update",
    }
