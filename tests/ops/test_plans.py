"""What an operator remembers between calls of one kind: the choice that would be made anew, whatever changed."""

import contextlib
import dataclasses
import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy_operators import EXAMPLES

from ssmzoo import ops
from ssmzoo.ops.dispatch import OPERATORS, op
from ssmzoo.ops.eager import static_facts

every_operator = pytest.mark.parametrize("example", EXAMPLES)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": functools.partial(torch.autocast, "cpu", torch.bfloat16),
    "deterministic": deterministic,
    "forward mode": forward_ad.dual_level,
    "function mode": Functions,
    "dispatch mode": Dispatches,
    "backend torch": functools.partial(ops.backend, "torch"),
    "backend c": functools.partial(ops.backend, "c"),
    "backend reference": functools.partial(ops.backend, "reference"),
}


@pytest.fixture
def served():
    """(operator, backend) of every call while the test runs; each must be what is chosen without any memory."""
    seen, before = [], {name: list(function.backends.values()) for name, function in OPERATORS.items()}

    def watched(function, name, backend):
        def serve(a):
            seen.append((name, backend))
            assert ops.chosen_backend(OPERATORS[name], **a._asdict()) == backend
            return function(a)

        return None if function is None else serve

    def register(name, b, wrap):
        keywords = {field.name: getattr(b, field.name) for field in dataclasses.fields(b)}
        function = wrap(keywords.pop("function"))
        keywords |= {key: wrap(keywords[key]) for key in ("composite", "eager")}
        OPERATORS[name].register(keywords.pop("name"), **keywords)(function)

    for name, backends in before.items():
        for b in backends:
            register(name, b, functools.partial(watched, name=name, backend=b.name))
    yield seen
    for name, backends in before.items():
        for b in backends:
            register(name, b, lambda function: function)


def example_call(example, dtype=torch.float32):
    """(the function of the named tensors, tensors in `dtype`) of an example."""
    function, make = EXAMPLES[example]()
    return function, {name: t.to(dtype) for name, t in make().items()}


def first(seen, function, tensors):
    """Who serves a call: the first operator and backend that saw it, or the words that refused it."""
    seen.clear()
    try:
        function(**tensors)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return seen[0]


@every_operator
@pytest.mark.parametrize("state", STATES)
def test_a_change_of_state_is_seen_by_the_next_call(served, example, state):
    function, tensors = example_call(example)
    before = first(served, function, tensors)
    assert len(before) == 2 and before == first(served, function, tensors)
    with STATES[state]():
        within = first(served, function, tensors)
        name = state.removeprefix("backend ")
        if name != state:
            assert within == (before[0], name) or "it cannot serve this call" in within
        assert within == first(served, function, tensors)
    assert before == first(served, function, tensors)


@every_operator
def test_gradients_types_and_layouts_are_seen_by_the_next_call(served, example):
    function, tensors = example_call(example)
    before = first(served, function, tensors)
    leaf = next(iter(tensors.values()))
    for wants in (True, False):
        leaf.requires_grad_(wants)
        first(served, function, tensors)
    assert first(served, function, tensors) == before
    for dtype in (torch.float64, torch.bfloat16):
        first(served, function, {name: t.to(dtype) for name, t in tensors.items()})
    strided = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in tensors.items()}
    first(served, function, strided)
    assert first(served, function, tensors) == before


@every_operator
def test_transforms_are_seen_by_the_next_call(served, example):
    function, tensors = example_call(example)
    before = first(served, function, tensors)
    name, leaf = next(iter(tensors.items()))

    def total(value):
        results = function(**tensors | {name: value})
        return sum(r.sum() for r in (results if isinstance(results, tuple) else (results,)))

    served.clear()
    torch.func.grad(total)(leaf)
    if "_update" not in example:  # those write into their state, which is not mapped here
        torch.func.vmap(total)(leaf[None])
    assert served[0][0] == before[0]
    assert first(served, function, tensors) == before


@every_operator
def test_a_backend_that_goes_away_is_not_asked_again(example):
    function, tensors = example_call(example)
    changed = {}
    expected = function(**tensors)
    try:
        for name, called in OPERATORS.items():
            if (b := called.backends.get("c")) is not None:
                changed[name] = b
                called.backends["c"] = dataclasses.replace(b, missing="its library is gone", function=None, eager=None)
        rounds = example == "quantized_linear"  # in float32, where its kernel rounds activations to 16 bits
        close = {"rtol": 1e-4, "atol": 1e-4} if rounds else {}
        torch.testing.assert_close(function(**tensors), expected, **close)
    finally:
        for name, b in changed.items():
            OPERATORS[name].backends["c"] = b


@pytest.fixture
def double():
    @op
    def double(x, times=1):
        return x * 2**times

    double.register("c")(lambda a: a.x * 4)
    yield double
    del OPERATORS["double"]


def test_backends_and_observers_that_come_later_are_seen_by_the_next_call(double):
    x, seen = torch.ones(2), []
    assert double(x).tolist() == double(x).tolist() == [4, 4]

    def look(call, *args, **kwargs):
        seen.append(args)
        return call(*args, **kwargs)

    with ops.observe(double=look):
        assert double(x).tolist() == [4, 4] and len(seen) == 1
    assert double(x).tolist() == [4, 4] and len(seen) == 1
    double.register("triton")(lambda a: a.x * 8)
    assert double(x).tolist() == [8, 8]
    double.register("triton", missing="no GPU")(lambda a: a.x * 8)
    assert double(x).tolist() == [4, 4]
    with ops.backend("reference"), ops.backend(None):
        assert double(x).tolist() == [4, 4]


def test_compiled_code_and_other_devices_are_chosen_for_anew(double):
    x = torch.ones(2)
    double(x)
    assert double(x.to("meta")).is_meta and double(x).tolist() == [4, 4]
    compiled = torch.compile(lambda x: double(x), fullgraph=True, backend="eager")
    assert compiled(x).tolist() == [4, 4]
    with ops.backend("reference"):
        assert compiled(x).tolist() == [2, 2]


def test_what_is_remembered_tells_kinds_of_arguments_apart(double):
    x = torch.ones(2)

    def facts(*values):
        return static_facts((x, *values))

    kinds = [1, 1.0, True, "1", None, torch.float32, (1,), (1.0,), (1, 1), (x,), (x, x)]
    assert len({facts(value) for value in kinds}) == len(kinds)
    assert facts(torch.nn.Parameter(x)) != facts(x) and facts(x.to_sparse) is None and facts([x]) is None


def negative_view(t):
    """t as a view of memory that holds -t: the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view


@pytest.mark.parametrize("example", [name for name in EXAMPLES if name != "complex_scan"])  # torch pairs no such views
def test_views_of_negated_memory_are_read_as_what_they_are(example):
    function, tensors = example_call(example)
    expected = function(**tensors)
    for name, t in tensors.items():
        torch.testing.assert_close(function(**tensors | {name: negative_view(t)}), expected)


@every_operator
def test_gradients_that_come_as_views_of_negated_memory(example):
    function, tensors = example_call(example)
    with torch.no_grad():
        plain = function(**tensors)
    if example.startswith(("mamba_step", "selective_state_update", "causal_conv1d_update")):
        return  # their kernels have no backward
    leaves = [t.requires_grad_() for t in tensors.values()]
    given = [torch.ones_like(r) for r in (plain if isinstance(plain, tuple) else (plain,))]
    grads = []
    for change in (lambda t: t, negative_view):
        results = function(**tensors)
        results = results if isinstance(results, tuple) else (results,)
        grads.append(torch.autograd.grad(results, leaves, [change(g) for g in given], allow_unused=True))
    torch.testing.assert_close(*grads)
