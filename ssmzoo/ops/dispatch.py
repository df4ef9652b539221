"""Choose the backend of an operator, and say in words why not another.

    def check(a): ...                               # ValueError for bad input; `a` is the call's tuple of arguments

    @op(check=check)                                # the body below is the reference, i.e. the definition
    def my_operator(x: Tensor, weight: Tensor): ... # its signature is the only list of arguments

    @my_operator.register("c", device="cpu", missing=why_no_library, unsupported=why_not)
    def my_operator_c(a): ...                       # a.x, a.weight; why_not(a) answers None or the reason

    with ssmzoo.ops.backend("torch"): ...           # or SSMZOO_BACKEND=torch in the environment when ssmzoo is imported
    with ssmzoo.ops.observe(my_operator=look): ...  # look(call, *args, **kwargs) sees every call and returns its result

The first backend of BACKENDS without an objection serves the call. Objections rest on static facts (device, dtype,
shape, needs a gradient), so that `torch.compile(fullgraph=True)` traces through the choice. An operator is a folder,
`ssmzoo/ops/<operator>/`, whose file `<backend>.py` registers that backend; `load_backends` finds and imports them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ssmzoo.ops.eager import NO_MEMORY, negated, static_facts
from ssmzoo.ops.failures import launch_failure
from ssmzoo.ops.transforms import transformed

BACKENDS = ("mamba_ssm", "triton", "c", "torch", "reference")
FORMER_NAMES = {"cuda": "mamba_ssm", "native": "c"}
PLANS = 512  # kinds of call that an operator remembers, so that their checks and the choice are made once
OPERATORS: dict[str, Callable] = {}  # public function by name, in order of definition


class BackendError(ValueError):
    """A backend was asked for that cannot serve the call; the message lists every backend's reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    function     of the operator's tuple of arguments
    device       "cpu" or "cuda" when it serves only that, None for any
    missing      why it cannot run on this machine at all ("triton is not installed"), None when it can
    unsupported  function of the tuple of arguments: why it cannot serve this call, None when it can
    broken       function without arguments for the table alone: why an install does not work, None when it does; for
                 what takes too long to find out when ssmzoo is imported, and is found by `unsupported` otherwise
    composite    the form made of torch's own functions alone, which serves while `transformed()`; None: refuse then,
                 and for tensors that are `negated`
    eager        the function again, for calls that nothing traces, transforms or watches; None: the function itself
    """

    name: str
    function: Callable
    device: str | None = None
    missing: str | None = None
    unsupported: Callable[[tuple], str | None] | None = None
    broken: Callable[[], str | None] | None = None
    composite: Callable | None = None
    eager: Callable | None = None

    def objection(self, a: tuple) -> str | None:
        if self.missing is not None:
            return self.missing
        if self.composite is None and transformed():
            return "has no rules for torch.func and forward-mode derivatives"
        if self.composite is None and negated(a):
            return "reads memory, which holds the opposite of what these views (of a conjugate) show"
        if self.device is not None and self.device != (given := _device_type(a)):
            return f"needs {self.device} tensors, got {given}"
        return self.unsupported(a) if self.unsupported is not None else None

    def serve(self, a: tuple):
        """The result, by the function itself or its composite form."""
        return self.composite(a) if transformed() else self.function(a)


@dataclass(frozen=True)
class BackendRow:
    """One line of the table that `ssmzoo backends` prints; `reason` is empty for an available backend."""

    operator: str
    backend: str
    available: bool
    reason: str


def op(reference: Callable | None = None, *, check: Callable | None = None, parts: tuple[str, ...] = ()):
    """Make a public operator of its reference implementation.

    check  function of the tuple of arguments that raises ValueError for bad input; called once, before the choice
    parts  operators that this one joins; while one of them is observed, the torch backend, which calls them, serves

    The operator has the attributes `reference`, `Arguments` (the named tuple of its arguments, with its defaults),
    `backends` (Backend by name, in order of preference) and `register`.
    """
    if reference is None:
        return functools.partial(op, check=check, parts=parts)
    name, bind = reference.__name__, _binder(reference)
    backends: dict[str, Backend] = {}
    plans: dict[tuple, Backend] = {}  # what serves calls of one kind
    positional = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(reference).parameters.values())

    @functools.wraps(reference)
    def call(*args, **kwargs):
        if len(args) > positional:
            raise TypeError(f"{name}() takes {positional} positional arguments but {len(args)} were given")
        a = bind(*args, **kwargs)
        facts = None if _observers else static_facts(a)
        if facts is not None and (plan := plans.get((_override, facts))) is not None:
            if backends.get(plan.name) is plan:  # else it was taken away since
                try:
                    return (plan.eager or plan.function)(a)
                except Exception as error:
                    return after_failure(plan, error, args, kwargs)
        if check is not None:
            check(a)
        if _observers:
            return _observed(name, backends, parts, args, kwargs)
        chosen = _choose(name, backends, a)
        try:
            if facts is None or NO_MEMORY in facts:
                return chosen.serve(a)
            if len(plans) >= PLANS:
                plans.clear()
            plans[_override, facts] = chosen
            return (chosen.eager or chosen.function)(a)
        except Exception as error:
            return after_failure(chosen, error, args, kwargs)

    def after_failure(failed: Backend, error: Exception, args: tuple, kwargs: dict):
        """A kernel that cannot be compiled here: told once, and the next backend serves, unless it was asked for."""
        reason = launch_failure(error)
        if reason is None:
            raise error
        if _override is not None:
            raise BackendError(f"{name}: backend {failed.name!r} was asked for; {reason}") from error
        backends[failed.name] = replace(failed, missing=reason)
        plans.clear()
        warnings.warn(f"{name}: {reason}. The next backend serves.", RuntimeWarning, stacklevel=3)
        return call(*args, **kwargs)

    def register(
        backend: str,
        *,
        device: str | None = None,
        missing: str | None = None,
        unsupported: Callable[[tuple], str | None] | None = None,
        broken: Callable[[], str | None] | None = None,
        composite: Callable | None = None,
        eager: Callable | None = None,
    ):
        """Register a function of the tuple of arguments; see Backend for the keywords.

        The torch and reference backends are their own composite form unless another is given.
        """
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}; the backends are {', '.join(BACKENDS)}")

        def keep(function: Callable) -> Callable:
            plain = composite or (function if backend in ("torch", "reference") else None)
            backends[backend] = Backend(backend, function, device, missing, unsupported, broken, plain, eager)
            plans.clear()
            ordered = sorted(backends.items(), key=lambda item: BACKENDS.index(item[0]))
            backends.clear()
            backends.update(ordered)
            return function

        return keep

    register("reference")(lambda a: reference(*a[:positional], **dict(zip(a._fields[positional:], a[positional:]))))
    call.register, call.backends, call.reference, call.Arguments = register, backends, reference, bind
    OPERATORS[name] = call
    return call


def load_backends(package: str) -> None:
    """Import every file `<operator>/<backend>.py` of a package, so that it registers its backend."""
    for operator in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
        if not operator.ispkg:
            continue
        home = importlib.import_module(operator.name)
        for file in pkgutil.iter_modules(home.__path__):
            if file.name in BACKENDS:
                importlib.import_module(f"{operator.name}.{file.name}")
        home.torch = torch  # PyTorch again, which the import of a submodule of this name has hidden from its package


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Within the block every operator runs on backend `name`, or raises BackendError; None restores the free choice.

    The choice holds for the process, not for one thread. A backward pass runs on the backend of its forward pass.
    """
    global _override
    name = _present_name(name)
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


def wanted_backend() -> str | None:
    """The backend that every operator must run on, by `backend` or SSMZOO_BACKEND; None: each call's own choice."""
    return _override


def any_observed() -> bool:
    """Whether some operator's calls are looked at."""
    return bool(_observers)


def chosen_backend(function: Callable, *args, **kwargs) -> str:
    """The name of the backend that would serve `function(*args, **kwargs)`."""
    return _choose(function.__name__, function.backends, function.Arguments(*args, **kwargs)).name


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


def _binder(function: Callable) -> type[tuple]:
    """The named tuple of a function's arguments with its defaults; called like the function, it binds a call."""
    parameters = inspect.signature(function).parameters.values()
    defaults = [p.default for p in parameters if p.default is not p.empty]
    bind = collections.namedtuple("Arguments", [p.name for p in parameters], defaults=defaults)
    bind.__annotations__ = {p.name: p.annotation for p in parameters}
    bind.__module__, bind.__qualname__ = function.__module__, f"{function.__qualname__}.Arguments"
    bind.__new__.__name__ = bind.__new__.__qualname__ = function.__name__  # in the TypeError for a misspelt keyword
    return bind


def _present_name(name: str | None) -> str | None:
    if name not in FORMER_NAMES:
        return name or None
    now = FORMER_NAMES[name]
    warnings.warn(f"the backend {name!r} is called {now!r} now", DeprecationWarning, stacklevel=4)
    return now


def _observed(name: str, backends: dict[str, Backend], parts: tuple[str, ...], args: tuple, kwargs: dict):
    def call(*args, **kwargs):
        a = OPERATORS[name].Arguments(*args, **kwargs)
        if any(part in _observers for part in parts):
            return backends["torch"].serve(a)
        return _choose(name, backends, a).serve(a)

    for observer in _observers.get(name, ()):
        call = functools.partial(observer, call)
    return call(*args, **kwargs)


def _device_type(a: tuple) -> str:
    return a[0].device.type  # the first argument of every operator is a tensor


def _choose(operator: str, backends: dict[str, Backend], a: tuple) -> Backend:
    wanted = _override
    if wanted is None:
        composed, device = transformed() or negated(a), _device_type(a)
        for b in backends.values():
            if b.missing is not None or (composed and b.composite is None) or (b.device or device) != device:
                continue
            if b.unsupported is None or b.unsupported(a) is None:
                return b
    elif wanted in backends and backends[wanted].objection(a) is None:
        return backends[wanted]
    reasons = []
    for name in BACKENDS:
        why = backends[name].objection(a) if name in backends else f"no {name} kernel for this operator"
        reasons.append(f"\n  {name}: {why or 'available'}")
    asked = f"backend {wanted!r} was asked for" if wanted else "no backend is willing"
    raise BackendError(f"{operator}: {asked}, but it cannot serve this call." + "".join(reasons))


_observers: dict[str, tuple[Callable, ...]] = {}  # operator: functions that see its calls, the innermost last
_override: str | None = _present_name(os.environ.get("SSMZOO_BACKEND"))
