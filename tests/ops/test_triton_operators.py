"""Every operator that has a GPU kernel, in Triton's interpreter: the examples of `benchmarks/gpu.py --only check` in
three dtypes and with offsets of 64 bits, kernels that cannot be compiled, launchers that read no value, the golden
cases, and models that train on GPU kernels alone.

Operators are those that are registered, so that none is left out. Tiles are as wide as on a GPU: few programs, which
the interpreter runs one after the other. One test runs this file in a process of its own.
"""

import dataclasses
import warnings

import gpu_parts
import pytest
import torch
from against_reference import GRAD, OUT, rounding
from interpreted import interpret, interpreted, outside, set_sizes
from paths import GOLDEN
from synchronisation import watched

import ssmzoo
from ssmzoo import ops
from ssmzoo.ops.triton import MISSING
from ssmzoo.released.golden import GoldenCase

if MISSING is not None:
    pytest.skip(MISSING, allow_module_level=True)
SERVED = {name for name, function in ops.OPERATORS.items() if "triton" in function.backends}
EXAMPLES = {f"{name}: {more}" if more else name: (call, make) for name, more, call, make in gpu_parts.small()}
BY_TORCH = ("linear_act", "depthwise_conv2d")  # their GPU form is torch's functions
REFUSED = {"dense_scan"}  # an example that no kernel serves: a mixture at every step
# how often elements are rounded on the way from arguments to results, where it is not once: projections and carried
# windows are in the layer's dtype, and the interpreter rounds towards zero, which counts twice
ROUNDED = {"cross_selective_scan": 4, "spatial_scan": 4, "mamba_step": 4, "mamba2_step": 6, "stack_step": 8}
CASES = sorted(
    path
    for family in ("selective_scan", "causal_conv1d", "ssd")
    for path in (GOLDEN / family).glob("*.json")
    if path.stem != "update"
)
LANGUAGE, IMAGE = dict(vocab_size=16, n_layer=1), dict(in_chans=1, num_classes=3, depths=[1], mlp_ratio=1.0)
MODELS = {  # model: arguments, sizes of a batch
    "mamba": (LANGUAGE | dict(d_model=4), (1, 5)),
    "mamba2": (LANGUAGE | dict(d_model=8, ssm_cfg=dict(d_state=4, headdim=8)), (1, 5)),
    "vmamba": (IMAGE | dict(dims=4, drop_path_rate=0.0), (1, 1, 12, 16)),
    "spatial_mamba": (IMAGE | dict(embed_dim=4, drop_path_rate=0.0), (1, 1, 12, 16)),
    "sd_ssm": (dict(input_size=3, num_classes=2, state_size=4, num_transition_matrices=2), (1, 5)),
    "mambair": (dict(in_chans=1, embed_dim=4, depths=[1], d_state=2, squeeze_factor=2), (1, 1, 6, 8)),
}


FAR, ROOM = 2**31, 1 << 12  # elements between the ends of a tensor that lies apart, and for what is not apart


@outside
def test_all_of_this_file_through_the_interpreter():
    interpret(__file__)


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch):
    """One chunk between saved states: what lies beyond a short string is computed for nothing."""
    from ssmzoo.ops.ssd import triton as ssd
    from ssmzoo.ops.taylor_attention import triton as taylor_attention

    set_sizes(monkeypatch, (ssd, dict(STRETCH=16)), (taylor_attention, dict(STRETCH=32)))


def test_every_operator_has_an_example():
    assert SERVED <= {name.partition(":")[0] for name in EXAMPLES}


def apart(call: dict, axis: int) -> dict:
    """The tensors as views in which the ends of this axis lie 2^31 elements apart, so that offsets need 64 bits; what
    lies between is never touched, and takes no memory."""
    memory, views = None, {}
    for i, (name, t) in enumerate(call.items()):
        if t.is_floating_point() and t.ndim > max(axis, 1) and t.shape[axis] > 1:
            memory = t.new_empty(FAR + FAR // 2) if memory is None else memory
            strides = list(t.select(axis, 0).contiguous().stride())
            strides.insert(axis, -(-FAR // (t.shape[axis] - 1) // (ROOM << 6)) * (ROOM << 6))
            assert t.numel() < ROOM and i < 1 << 6
            t = memory.as_strided(t.shape, strides, i * ROOM).copy_(t)
        views[name] = t
    return views


@interpreted
@pytest.mark.parametrize(
    "dtype, axis",
    [pytest.param(torch.float32, None, marks=pytest.mark.slow), (torch.bfloat16, 1), (torch.float16, 0)],
    ids=["fp32", "bf16", "fp16"],  # the other files have fp32
)
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n.partition(":")[0] in SERVED and n not in REFUSED])
def test_results_and_gradients_in_every_dtype_and_beyond_32_bits(name, dtype, axis):
    torch.manual_seed(0)
    function, make = EXAMPLES[name]
    call = make(dtype)
    expected = gpu_parts.gradients(function, "reference", call, torch.float64)
    times = 2 * ROUNDED.get(name.partition(":")[0], 1)
    limits = (OUT, GRAD) if dtype == torch.float32 else (rounding(dtype, times), rounding(dtype, 2 * times))
    with watched() as places:
        row = gpu_parts.compared(function, "triton", call if axis is None else apart(call, axis), expected, limits)
    assert not [place for place in places if place.startswith("ops")]
    if row["verdict"].startswith("computes with contiguous tensors"):  # steps of layers, whose tensors are small
        row = gpu_parts.compared(function, "triton", call, expected, limits)
    assert row["verdict"] == "ok", row


class CompilationError(Exception):
    """As Triton's own."""


CompilationError.__module__ = "triton.compiler.errors"


@pytest.fixture
def registered_again():
    """What has been taken away is there again after the test, and no choice of it is remembered."""
    before = {name: ops.OPERATORS[name].backends["triton"] for name in SERVED}
    yield
    for name, backend in before.items():
        options = {field.name: getattr(backend, field.name) for field in dataclasses.fields(backend)[2:]}
        ops.OPERATORS[name].register("triton", **options)(backend.function)


@interpreted
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n.partition(":")[0] in SERVED and n not in REFUSED])
def test_a_kernel_that_cannot_be_compiled_is_told_once_and_replaced(name, monkeypatch, registered_again):
    from triton.runtime.interpreter import GridExecutor

    def fails(*args, **kwargs):
        raise CompilationError("ptxas fatal: Value 'sm_61' is not defined for option 'gpu-name'")

    function, make = EXAMPLES[name]
    call = make(torch.float32)
    with torch.no_grad(), ops.backend("reference"):
        expected = function(**call)
    monkeypatch.setattr(GridExecutor, "__call__", fails)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RuntimeWarning)
        if not name.startswith(BY_TORCH):
            asked = pytest.raises(ops.BackendError, match="was asked for; Triton cannot run .*sm_61")
            with ops.backend("triton"), asked:
                function(**call)
        for _ in range(2):
            torch.testing.assert_close(function(**call), expected, rtol=1e-4, atol=1e-4)
    lines = [str(warning.message) for warning in told]
    assert bool(lines) != name.startswith(BY_TORCH) and len(lines) == len(set(lines))  # once for each operator of it
    assert all("sm_61" in line and line.endswith("The next backend serves.") for line in lines)


@interpreted
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_cases(path):
    with ops.backend("triton"):
        out, grad = GoldenCase.load(path).check()
    assert out < 1e-4 and grad < 1e-4


def losses(name: str, backend: str | None) -> list[float]:
    """Of two batches, with a step of training between."""
    torch.manual_seed(0)
    arguments, sizes = MODELS[name]
    model = ssmzoo.create_model(name, **arguments)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        batch = torch.randn(sizes) if len(sizes) == 4 else torch.randint(arguments.get("input_size", 16), sizes)
        with ops.backend(backend):
            out = model(batch)
            loss = getattr(out, "logits", out[0] if isinstance(out, tuple) else out).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@interpreted
@pytest.mark.parametrize("name", MODELS)
def test_models_train_on_gpu_kernels_alone_as_on_the_cpu(name):
    """The backend that is asked for by name serves every operator of theirs, or raises."""
    assert losses(name, "triton") == pytest.approx(losses(name, "torch"), rel=1e-4)
