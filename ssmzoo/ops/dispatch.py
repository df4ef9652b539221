"""Choose the backend of an operator, and say in words why not another.

    @op(check=check_arguments)                      # the body below is the reference, i.e. the definition
    def my_operator(x, weight): ...

    @my_operator.register("native", device="cpu", missing=why_no_library, unsupported=why_not_native)
    def my_operator_native(x, weight): ...          # same signature

    with ssmzoo.ops.backend("torch"): ...           # or the environment variable SSMZOO_BACKEND=torch
    with ssmzoo.ops.observe(my_operator=look): ...  # look(call, *args, **kwargs) sees every call and returns its result

The first backend of BACKENDS without an objection serves the call. Objections rest on static facts (device, dtype,
shape, needs a gradient), so that `torch.compile(fullgraph=True)` traces through the choice.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmzoo.ops.transforms import transformed

BACKENDS = ("cuda", "triton", "native", "torch", "reference")
PLAIN = (Tensor, torch.nn.Parameter)
OPERATORS: dict[str, Callable] = {}  # public function by name, in order of definition

_observers: dict[str, tuple[Callable, ...]] = {}  # operator: functions that see its calls, the innermost last
_override: str | None = os.environ.get("SSMZOO_BACKEND") or None


class BackendError(ValueError):
    """A backend was asked for that cannot serve the call; the message lists every backend's reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    device       "cpu" or "cuda" when it serves only that, None for any
    missing      why it cannot run on this machine at all ("triton is not installed"), None when it can
    unsupported  function of the operator's arguments: why it cannot serve this call, None when it can
    broken       function without arguments for the table alone: why an install does not work, None when it does; for
                 what takes too long to find out when ssmzoo is imported, and is found by `unsupported` otherwise
    composite    the form made of torch's own functions alone, which serves while `transformed()`; None: refuse then
    """

    name: str
    function: Callable
    device: str | None = None
    missing: str | None = None
    unsupported: Callable[..., str | None] | None = None
    broken: Callable[[], str | None] | None = None
    composite: Callable | None = None

    def objection(self, args: tuple, kwargs: dict) -> str | None:
        if self.missing is not None:
            return self.missing
        if self.composite is None and transformed():
            return "has no rules for torch.func and forward-mode derivatives"
        if self.device is not None:
            given = _device_type(args, kwargs)
            if given != self.device:
                return f"needs {self.device} tensors, got {given}"
        return self.unsupported(*args, **kwargs) if self.unsupported is not None else None

    @property
    def serve(self) -> Callable:
        """What is called: the function itself, or its composite form."""
        return self.composite if transformed() else self.function


@dataclass(frozen=True)
class BackendRow:
    """One line of the table that `ssmzoo backends` prints; `reason` is empty for an available backend."""

    operator: str
    backend: str
    available: bool
    reason: str


def op(reference: Callable | None = None, *, check: Callable | None = None, parts: tuple[str, ...] = ()):
    """Make a public operator of its reference implementation.

    check  function of the same arguments that raises ValueError for bad input; called once, before the choice
    parts  operators that this one joins; while one of them is observed, the torch backend, which calls them, serves
    """
    if reference is None:
        return functools.partial(op, check=check, parts=parts)
    backends: dict[str, Backend] = {}

    @functools.wraps(reference)
    def call(*args, **kwargs):
        if check is not None:
            check(*args, **kwargs)
        if _observers:
            return _observed(reference.__name__, backends, parts, args, kwargs)
        return _choose(reference.__name__, backends, args, kwargs).serve(*args, **kwargs)

    def register(
        name: str,
        *,
        device: str | None = None,
        missing: str | None = None,
        unsupported: Callable | None = None,
        broken: Callable[[], str | None] | None = None,
        composite: Callable | None = None,
    ):
        """Register an implementation with the operator's signature; see Backend for the arguments.

        The torch and reference backends are their own composite form unless another is given.
        """
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")

        def keep(function: Callable) -> Callable:
            plain = composite or (function if name in ("torch", "reference") else None)
            backends[name] = Backend(name, function, device, missing, unsupported, broken, plain)
            ordered = sorted(backends.values(), key=lambda b: BACKENDS.index(b.name))
            backends.clear()
            backends.update((b.name, b) for b in ordered)
            return function

        return keep

    if check is not None:  # a misspelt keyword is reported under the operator's own name
        check.__name__, check.__qualname__ = reference.__name__, reference.__qualname__
    register("reference")(reference)
    call.register, call.backends, call.reference = register, backends, reference
    OPERATORS[reference.__name__] = call
    return call


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block every operator runs on backend `name`, or raises BackendError; None restores the free choice.

    The choice holds for the process, not for one thread. A backward pass runs on the backend of its forward pass.
    """
    global _override
    if name is not None and name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; the backends are {', '.join(BACKENDS)}")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


@contextlib.contextmanager
def observe(**observers: Callable) -> Iterator[None]:
    """Within the block, `name=function` stands between the callers of operator `name` and the operator.

    function(call, *args, **kwargs) receives the operator first and the caller's arguments behind it, and returns what
    the caller gets: `call(*args, **kwargs)`, looked at or replaced. Operators that join an observed one run in parts,
    so that their parts are seen. Blocks nest; the innermost sees a call first. The observation holds for the process,
    not for one thread, like a choice of backend. Raises ValueError for a name that is no operator.
    """
    global _observers
    for name in observers:
        if name not in OPERATORS:
            raise ValueError(f"there is no operator {name!r} to observe; the operators are {', '.join(OPERATORS)}")
    previous = _observers
    _observers = previous | {name: (*previous.get(name, ()), function) for name, function in observers.items()}
    try:
        yield
    finally:
        _observers = previous


def _observed(name: str, backends: dict[str, Backend], parts: tuple[str, ...], args: tuple, kwargs: dict):
    def call(*args, **kwargs):
        if any(part in _observers for part in parts):
            return backends["torch"].function(*args, **kwargs)
        return _choose(name, backends, args, kwargs).serve(*args, **kwargs)

    for observer in _observers.get(name, ()):
        call = functools.partial(observer, call)
    return call(*args, **kwargs)


def chosen_backend(function: Callable, *args, **kwargs) -> str:
    """The name of the backend that would serve `function(*args, **kwargs)`."""
    return _choose(function.__name__, function.backends, args, kwargs).name


def backend_table() -> list[BackendRow]:
    """Every operator on every backend, available on this machine or not, and why not."""
    rows = []
    for name, function in OPERATORS.items():
        for backend_name in BACKENDS:
            b = function.backends.get(backend_name)
            reason = f"no {backend_name} kernel for this operator" if b is None else b.missing
            if reason is None and b.device == "cuda" and not torch.cuda.is_available():
                reason = "no CUDA device"
            if reason is None and b.broken is not None:
                reason = b.broken()
            rows.append(BackendRow(name, backend_name, reason is None, reason or ""))
    return rows


def no_double_backward(operator: str, backend: str = "torch") -> Callable:
    """The autograd function of a backward kernel: it refuses and names the `backend` that has second derivatives."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{operator} has no double backward on its fast backends; compute second derivatives within "
            f"`with ssmzoo.ops.backend('{backend}'):`"
        )

    return refuse


def differentiate(operator: str, library: torch.library.Library) -> None:
    """Autograd for ssmzoo::<operator>(*tensors), one result: ssmzoo::<operator>_backward(dy, *tensors), once."""
    backward = getattr(torch.ops.ssmzoo, f"{operator}_backward")

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    torch.library.register_autograd(
        f"ssmzoo::{operator}", lambda ctx, dy: backward(dy, *ctx.saved_tensors), setup_context=setup, lib=library
    )
    torch.library.register_autograd(f"ssmzoo::{operator}_backward", no_double_backward(operator), lib=library)


def gradients_by(function: Callable, tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...], dy: Tensor) -> tuple:
    """For a backward whose results are to be differentiated again: autograd's gradients of `function(*tensors)`
    times dy, as many as `wanted` (which goes on for arguments that are no tensors), None where that is False."""
    given = [t for t, want in zip(tensors, wanted) if want]
    found = iter(torch.autograd.grad(function(*tensors), given, dy, create_graph=True))
    return tuple(next(found) if want else None for want in wanted)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will want the backward of a function of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def unobserved(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called directly: nothing traces, transforms or wraps these tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or transformed():
        return False
    return all(t is None or (type(t) in PLAIN and not t.is_meta) for t in tensors)


def watched() -> str | None:
    """The reason not to take a shortcut past torch's functions while a mode watches them (the probes' rules do)."""
    if not torch.compiler.is_compiling() and torch._C._len_torch_function_stack():
        return "a mode that watches torch's functions is active"
    return None


def _device_type(args: tuple, kwargs: dict) -> str | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value.device.type
    return None


def _choose(operator: str, backends: dict[str, Backend], args: tuple, kwargs: dict) -> Backend:
    wanted = _override
    if wanted is None:
        for b in backends.values():
            if b.objection(args, kwargs) is None:
                return b
    elif wanted in backends and backends[wanted].objection(args, kwargs) is None:
        return backends[wanted]
    reasons = []
    for name in BACKENDS:
        why = backends[name].objection(args, kwargs) if name in backends else f"no {name} kernel for this operator"
        reasons.append(f"\n  {name}: {why or 'available'}")
    asked = f"backend {wanted!r} was asked for" if wanted else "no backend is willing"
    raise BackendError(f"{operator}: {asked}, but it cannot serve this call." + "".join(reasons))
