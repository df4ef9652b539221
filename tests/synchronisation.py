"""Would the host have to wait for a GPU? Found without one: a step is traced with tensors that have no values.

    with without_values() as traced:
        traced.move(model)
        model(traced.tensor(ids)).logits.sum().backward()        # raises Waits where a value is read

Shapes and dtypes are real, values are not there. What reads one (`item`, `bool`, `int`, `tolist`), makes a shape of
some (`nonzero`, boolean indexing) or builds a tensor of Python's numbers (`torch.tensor`, `new_tensor`: a copy to the
GPU, for which torch waits) raises Waits. Kernels of ours are called by their registered operators, in whose place torch
runs their shape functions; what stands within them and behind `eager` is looked at by `watched`.
"""

import contextlib
import functools
import os
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ssmzoo

READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive", "_unique2")
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException)  # how torch says that it lacks the values


NOWHERE = property(lambda self: False)  # in place of is_cpu: what is done on a CPU alone is left out


class Waits(RuntimeError):
    """The host would have to wait for the GPU."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS:
            raise Waits(f"{name}: the host reads values")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise Waits(f"{name}: a bool index makes a shape of values")
        if name == "lift_fresh" and args[0].numel():
            raise Waits("a tensor is built of Python's numbers and copied to the GPU")
        return func(*args, **(kwargs or {}))


class Traced:
    def tensor(self, t: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)

    def move(self, model: torch.nn.Module) -> torch.nn.Module:
        """In place; shared parameters stay shared."""
        done = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, t in held.items():
                    if t is not None:
                        if id(t) not in done:
                            new = self.tensor(t)
                            parameter = isinstance(t, torch.nn.Parameter)
                            done[id(t)] = t, torch.nn.Parameter(new, t.requires_grad) if parameter else new
                        held[name] = done[id(t)][1]
        return model


@contextlib.contextmanager
def without_values():
    try:
        with FakeTensorMode(), _Watch(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cpu", NOWHERE)
            yield Traced()
    except UNKNOWN as error:
        raise Waits(str(error)) from error


READERS = (
    "item",
    "tolist",
    "numpy",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "masked_select",
    "unique",
)
BUILDERS = ("tensor", "as_tensor")


@contextlib.contextmanager
def watched():
    """The same for steps that run, with what stands within registered operators and behind `eager`: a list of
    "file:line function: what" of every place of ours that reads a value in Python, builds a tensor of numbers, or
    indexes with bools."""
    found, root = [], str(Path(ssmzoo.__file__).parent) + os.sep

    def note(what):
        frame = sys._getframe(2)
        file = frame.f_code.co_filename
        if file.startswith(root):
            found.append(f"{file.removeprefix(root)}:{frame.f_lineno} {frame.f_code.co_name}: {what}")

    def reading(name, plain):
        @functools.wraps(plain)
        def read(self, *args, **kwargs):
            note(name)
            return plain(self, *args, **kwargs)

        return read

    def building(name, plain):
        @functools.wraps(plain)
        def build(data, *args, **kwargs):
            if not isinstance(data, torch.Tensor):
                note(name)
            return plain(data, *args, **kwargs)

        return build

    def new_tensor(self, data, *args, **kwargs):
        note("new_tensor")
        return plain_new(self, data, *args, **kwargs)

    def is_bool(index):
        parts = index if isinstance(index, tuple) else (index,)
        return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in parts)

    def getitem(self, index):
        if is_bool(index):
            note("bool index")
        return plain_get(self, index)

    plain_get, plain_new = torch.Tensor.__getitem__, torch.Tensor.new_tensor
    with pytest.MonkeyPatch.context() as patch:
        for name in READERS:
            patch.setattr(torch.Tensor, name, reading(name, getattr(torch.Tensor, name)))
        for name in BUILDERS:
            patch.setattr(torch, name, building(name, getattr(torch, name)))
        patch.setattr(torch.Tensor, "__getitem__", getitem)
        patch.setattr(torch.Tensor, "new_tensor", new_tensor)
        patch.setattr(torch.Tensor, "is_cpu", NOWHERE)
        yield found
