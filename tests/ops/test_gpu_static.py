"""GPU kernels compiled on a machine without a GPU: none is left out, and usual calls stay within the limits."""

import importlib
import inspect

import gpu_compile
import gpu_static
import pytest

from ssmzoo.ops.triton import INTERPRETED, MISSING

pytestmark = pytest.mark.skipif(bool(INTERPRETED or MISSING), reason=MISSING or "the interpreter compiles nothing")


def kernels(operator: str) -> set[str]:
    """Functions of triton_kernels.py that are launched: the ones without an underscore in front."""
    from triton.runtime.jit import JITFunction

    if not gpu_static.has_kernels(operator):
        return set()
    module = importlib.import_module(f"ssmzoo.ops.{operator}.triton_kernels")
    found = inspect.getmembers(module, lambda f: isinstance(f, JITFunction))
    return {name for name, f in found if f.fn.__module__ == module.__name__ and not name.startswith("_")}


@pytest.mark.parametrize("operator", gpu_static.operators())
def test_every_kernel_has_variants(operator):
    launcher = gpu_static.launcher(operator)
    launched = set().union(*(gpu_compile.names(variant.run) for variant in launcher.variants()))
    assert kernels(operator) <= launched <= set(launcher.PASSES)
    assert any(variant.typical for variant in launcher.variants())


@pytest.mark.parametrize("operator", [name for name in gpu_static.operators() if gpu_static.has_kernels(name)])
def test_sums_of_programs_are_added_in_order(operator):
    """A run repeats bit by bit: no program adds to what another one writes."""
    module = importlib.import_module(f"ssmzoo.ops.{operator}.triton_kernels")
    assert "atomic" not in inspect.getsource(module)


@pytest.mark.parametrize("operator", gpu_static.operators())
def test_usual_calls_compile_within_the_limits(operator):
    """Every kernel once, each operator for another GPU; the slow test below has all forms for all of them."""
    targets = list(gpu_compile.TARGETS)
    target = targets[gpu_static.operators().index(operator) % len(targets)]
    rows = list(gpu_static.compiled(operator, target, typical=True, once=True))
    assert rows and all(
        0 < row.launch.registers <= gpu_compile.TARGETS[target].most and row.per_element["all"] > 0 for row in rows
    )
    wrong = [(row.launch.kernel, row.label, row.objections) for row in rows if row.default and row.objections]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("target", gpu_compile.TARGETS)
def test_everything_compiles_within_the_limits(target):
    rows = [row for operator in gpu_static.operators() for row in gpu_static.compiled(operator, target)]
    assert not [(r.operator, r.launch.kernel, r.label, r.objections) for r in rows if r.default and r.objections]
    assert gpu_static.page(rows).count(f"| {target} |") == len(set(gpu_static.table(rows)[2:]))


def test_a_kernel_beyond_the_limits_is_named():
    row, *_ = gpu_static.compiled("rms_norm", "sm_80", typical=True, once=True)
    launch = gpu_compile.Launched(**vars(row.launch) | dict(spilled=8, shared=1 << 20, registers=255, num_warps=16))
    said = "; ".join(row._replace(launch=launch).objections)
    assert "spills 8 bytes" in said and "shared memory" in said and "threads at once" in said
