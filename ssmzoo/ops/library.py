"""Kernels as torch.library operators, with everything that torch wants to know derived from one tuple of arguments.

    class Inputs(NamedTuple):
        x: Tensor
        bias: Tensor | None
        silu: bool

    CONV = Differentiable("causal_conv1d", Inputs, ("out",), like=lambda a: (torch.empty_like(a.x),))
    CONV.kernels["c"] = Kernel(forward, backward)
    out = CONV(Inputs(x, None, True), "c")

gives ssmzoo::causal_conv1d and ssmzoo::causal_conv1d_backward with schemas, fake tensors and autograd.
"""

from __future__ import annotations

import collections
import typing
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.eager import eager, needs_grad
from ssmzoo.ops.failures import launch_failure
from ssmzoo.ops.transforms import batched

LIBRARY = torch.library.Library("ssmzoo", "FRAGMENT")
TENSORS = (Tensor, Tensor | None)
SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", str | None: "str?", bool: "bool"} | {
    t: t.__name__ for t in (int, float, str)
}


def schema(arguments: type[tuple], mutated: tuple[str, ...] = ()) -> str:
    """The arguments of a torch.library operator: the fields of a named tuple with their annotations."""
    hints = typing.get_type_hints(arguments)
    return ", ".join(f"Tensor({n}!) {n}" if n in mutated else f"{SCHEMA[hints[n]]} {n}" for n in arguments._fields)


def without(arguments: type[tuple], *omitted: str) -> type[tuple]:
    """The named tuple of an operator's arguments but for those that its kernels do not need."""
    hints = typing.get_type_hints(arguments)
    kept = {name: hints[name] for name in arguments._fields if name not in omitted}
    inputs = collections.namedtuple("Inputs", kept)
    inputs.__annotations__ = kept
    return inputs


def select(inputs: type[tuple], a: tuple, **changes) -> tuple:
    """The tuple `inputs` filled from `changes` and from the fields of the same names of `a`."""
    return inputs(*[changes[name] if name in changes else getattr(a, name) for name in inputs._fields])


def in_place(name: str, inputs: type[tuple], mutated: str, function: Callable[[tuple], Tensor], like: str):
    """ssmzoo::<name>, which changes the argument `mutated` and returns a tensor like the argument `like`.

    It has no backward. Returns the operator; its arguments are the fields of `inputs`.
    """
    LIBRARY.define(f"{name}({schema(inputs, (mutated,))}) -> Tensor")
    LIBRARY.impl(name, lambda *values: function(inputs(*values)), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"ssmzoo::{name}", lambda *values: torch.empty_like(getattr(inputs(*values), like)), lib=LIBRARY
    )
    return getattr(torch.ops.ssmzoo, name).default


class Kernel(NamedTuple):
    """How one backend computes a Differentiable.

    forward(a, save)             -> (results, saved): a tuple of tensors, and what the backward wants (None without it)
    backward(a, saved, *dresults) -> gradients by the name of the argument, of its shape and dtype, where one is given;
                                   the gradient of the first result is there, those of others may be None
    saved(a)                     -> an uninitialised tensor like the saved one
    """

    forward: Callable[..., tuple[tuple[Tensor, ...], Tensor | None]]
    backward: Callable[..., dict[str, Tensor]]
    saved: Callable[[tuple], Tensor] | None = None


class Differentiable:
    """A function of tensors with kernels for its values and its gradients.

    inputs     named tuple with annotations: the arguments of the kernels
    results    names of the results
    saved      what the forward keeps for the backward: one of the results or, by any other name, a tensor of its own
    like       a -> uninitialised results, for tracing; None: the kernels are only called with `why_not_eager`'s consent
    gradients  a -> uninitialised gradients by name in the layout of the backward's; contiguous by default
    twice      a -> the result by torch's functions, for gradients of gradients; None: they are refused
    refer      the backend that has gradients of gradients, for the message of the refusal
    """

    def __init__(
        self,
        name: str,
        inputs: type[tuple],
        results: tuple[str, ...] = ("y",),
        *,
        saved: str | None = None,
        like: Callable[[tuple], tuple[Tensor, ...]] | None = None,
        gradients: Callable[[tuple], dict[str, Tensor]] | None = None,
        twice: Callable[[tuple], Tensor] | None = None,
        refer: str = "torch",
    ):
        self.name, self.Inputs, self.results, self.like, self.twice = name, inputs, results, like, twice
        self.kept = results.index(saved) if saved in results else None
        self.hidden = saved is not None and saved not in results
        self.empty_gradients = gradients or self.contiguous_gradients
        hints = typing.get_type_hints(inputs)
        self.tensors = [n for n in inputs._fields if hints[n] in TENSORS]
        self.is_tensor = tuple(n in self.tensors for n in inputs._fields)
        self.positions = tuple(i for i, tensor in enumerate(self.is_tensor) if tensor)
        self.kernels: dict[str, Kernel] = {}
        if like is not None:
            self._define(refer)

    def __call__(self, a: tuple, backend: str) -> Tensor | tuple[Tensor, ...]:
        """The result or results of the kernel registered under `backend`; `a` has at least the fields of `inputs`."""
        a = a if type(a) is self.Inputs else select(self.Inputs, a)
        tensors = [a[i] for i in self.positions]
        save = needs_grad(*tensors) and not torch.compiler.is_exporting()  # see `recomputed`
        if self.like is not None and not eager(*tensors):
            results = self.forward_op(*a, save, backend)
            results = results if isinstance(results, tuple) else (results,)
        elif save:
            results = _Eager.apply(self, backend, a, *tensors)
        else:
            results, _ = self.kernels[backend].forward(a, False)
        return results[0] if len(self.results) == 1 else results[: len(self.results)]

    def eager(self, backend: str, a: tuple) -> Tensor | tuple[Tensor, ...]:
        """The same for a tuple of `Inputs` that nothing traces, transforms or watches."""
        if torch.is_grad_enabled():
            tensors = [getattr(a, name) for name in self.tensors]
            if needs_grad(*tensors):
                results = _Eager.apply(self, backend, a, *tensors)
                return results[0] if len(self.results) == 1 else results
        results, _ = self.kernels[backend].forward(a, False)
        return results[0] if len(self.results) == 1 else results

    def contiguous_gradients(self, a: tuple) -> dict[str, Tensor]:
        given = {name: getattr(a, name) for name in self.tensors}
        return {n: t.new_empty(t.shape) for n, t in given.items() if t is not None and t.is_floating_point()}

    def remember(self, ctx, a: tuple, backend: str, results: tuple[Tensor, ...], saved: Tensor | None) -> None:
        saved = saved if self.kept is None else results[self.kept]
        ctx.save_for_backward(saved, *[a[i] for i in self.positions])
        ctx.call = self, backend, [None if tensor else value for tensor, value in zip(self.is_tensor, a)]
        ctx.set_materialize_grads(False)

    def gradients(self, ctx, dresults: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        """By the name of the argument, for those that have one."""
        saved, *tensors = ctx.saved_tensors  # read once: gradient checkpointing recomputes them for one reading only
        _, backend, values = ctx.call
        values = list(values)  # the context must not keep the tensors alive
        for i, tensor in zip(self.positions, tensors):
            values[i] = tensor
        a = self.Inputs(*values)
        if dresults[0] is None:
            if all(d is None for d in dresults):
                return {}
            dresults = (torch.zeros_like(self.like(a)[0]), *dresults[1:])
        by_torch = torch.is_grad_enabled() or batched(*dresults)
        if by_torch and self.twice is not None:
            return self.differentiable_gradients(a, dresults[0])
        dresults = tuple(None if d is None else d.resolve_neg() for d in dresults)  # of a conjugate's imaginary part
        if by_torch or not eager(*dresults, saved, *tensors):
            found = zip(self.tensors, self.backward_op(*dresults, saved, *a, backend), tensors)
            return {name: grad for name, grad, t in found if t is not None and t.is_floating_point()}
        try:
            return self.kernels[backend].backward(a, self.recomputed(a, saved, backend), *dresults)
        except Exception as error:
            if (reason := launch_failure(error)) is None:
                raise
            instead = "within `with ssmzoo.ops.backend('torch'):` or by SSMZOO_BACKEND=torch it is found"
            raise RuntimeError(f"the gradient of {self.name}: {reason}; {instead}") from error

    def recomputed(self, a: tuple, saved: Tensor | None, backend: str) -> Tensor | None:
        """What the forward keeps, computed anew where it kept nothing: in exported programs, whose lengths may vary."""
        if self.hidden and saved is not None and saved.numel() == 0:
            return self.kernels[backend].forward(a, True)[1]
        return saved

    def differentiable_gradients(self, a: tuple, dresult: Tensor) -> dict[str, Tensor]:
        names = [n for n in self.tensors if getattr(a, n) is not None and getattr(a, n).requires_grad]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            given = [getattr(a, name).view_as(getattr(a, name)) for name in names]  # one may have been made of another
            y = self.twice(a._replace(**dict(zip(names, given))))
        return dict(zip(names, torch.autograd.grad(y, given, dresult, create_graph=again)))

    def _define(self, refer: str) -> None:
        name, count, inputs = self.name, len(self.results), self.Inputs
        shape = ", ".join(["Tensor"] * (count + self.hidden))
        LIBRARY.define(f"{name}({schema(inputs)}, bool save, str backend) -> ({shape})")
        given = "".join(f"Tensor? d_{result}, " for result in self.results)
        shape = ", ".join(["Tensor"] * len(self.tensors))
        LIBRARY.define(f"{name}_backward({given}Tensor? saved, {schema(inputs)}, str backend) -> ({shape})")
        self.forward_op = getattr(torch.ops.ssmzoo, name).default
        self.backward_op = getattr(torch.ops.ssmzoo, f"{name}_backward").default

        def forward(*values):
            *a, save, backend = values
            results, saved = self.kernels[backend].forward(inputs(*a), save)
            return self._outputs(results, saved)

        def fake_forward(*values):
            *a, save, backend = values
            a = inputs(*a)
            saved = self.kernels[backend].saved(a) if self.hidden and save else None
            return self._outputs(self.like(a), saved)

        def backward(*values):
            *dresults, saved = values[: count + 1]
            a, backend = inputs(*values[count + 1 : -1]), values[-1]
            return self._listed(a, self.kernels[backend].backward(a, self.recomputed(a, saved, backend), *dresults))

        def fake_backward(*values):
            a = inputs(*values[count + 1 : -1])
            return self._listed(a, self.empty_gradients(a))

        def remember(ctx, inputs, output):
            *a, _, backend = inputs
            output = output if isinstance(output, tuple) else (output,)
            if self.hidden:
                ctx.mark_non_differentiable(output[-1])
            self.remember(ctx, self.Inputs(*a), backend, output[:count], output[-1] if self.hidden else None)

        def gradients(ctx, *dresults):
            found = self.gradients(ctx, dresults[:count])
            return *(found.get(name) for name in inputs._fields), None, None

        def refuse(ctx, *dresults):
            raise RuntimeError(
                f"{name} has no double backward on its fast backends; compute second derivatives within "
                f"`with ssmzoo.ops.backend('{refer}'):`"
            )

        for suffix, real, fake in (("", forward, fake_forward), ("_backward", backward, fake_backward)):
            LIBRARY.impl(name + suffix, real, "CompositeExplicitAutograd")
            torch.library.register_fake(f"ssmzoo::{name}{suffix}", fake, lib=LIBRARY)
        torch.library.register_autograd(f"ssmzoo::{name}", gradients, setup_context=remember, lib=LIBRARY)
        torch.library.register_autograd(f"ssmzoo::{name}_backward", refuse, lib=LIBRARY)

    def _outputs(self, results: Iterable[Tensor], saved: Tensor | None):
        results = tuple(results)
        if self.hidden:
            return *results, results[0].new_empty(0) if saved is None else saved
        return results if len(results) > 1 else results[0]

    def _listed(self, a: tuple, found: dict[str, Tensor]):
        missing = next(t for t in a if isinstance(t, Tensor))
        listed = tuple(found.get(name, None) for name in self.tensors)
        listed = tuple(missing.new_empty(0) if t is None else t for t in listed)
        return listed if len(listed) > 1 else listed[0]


class _Eager(torch.autograd.Function):
    """The same without torch's dispatcher, which takes longer than a small kernel."""

    @staticmethod
    def forward(ctx, kernel: Differentiable, backend: str, a: tuple, *tensors):
        results, saved = kernel.kernels[backend].forward(a, True)
        kernel.remember(ctx, a, backend, results, saved)
        return results

    @staticmethod
    def backward(ctx, *dresults):
        kernel = ctx.call[0]
        found = kernel.gradients(ctx, dresults)
        return None, None, None, *[found.get(name) for name in kernel.tensors]
