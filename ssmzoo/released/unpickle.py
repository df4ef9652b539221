"""torch's pickles read without importing or calling anything that they name.

Tensors, plain containers and numbers come out as they are. A class that is none of these (a training script's
argparse.Namespace, yacs.config.CfgNode, numpy scalars) becomes an inert `Record`: its name and what the file says about
it. Names whose only use is to run something (os.system, builtins.eval, ...) are refused, although nothing would run.
"""

from __future__ import annotations

import _compat_pickle  # what pickle itself knows of Python 2's names
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = {  # modules and classes of Python's library that hold data; every other one is refused
    "argparse.Namespace",
    "types.SimpleNamespace",
    "functools.partial",
    "time.struct_time",
    "copyreg._reconstructor",
    *("collections", "datetime", "decimal", "enum", "fractions", "ipaddress", "numbers", "pathlib", "uuid", "zoneinfo"),
}
PLAIN = (
    "set",
    "frozenset",
    "list",
    "tuple",
    "dict",
    "complex",
    "slice",
    "range",
    "bytearray",
    "object",
    "int",
    "float",
)
PLAIN += ("str", "bool", "bytes")
STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8},
        **{"Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128},
        "Untyped": torch.uint8,
    }.items()
}


class Refused(ValueError):
    """A pickle that names what no file of weights needs; the message says which."""


class Record(dict):
    """What stands for an object of an unknown class: its arguments, its items and its state, never the object.

    name  the class's, `args` what it would be called with, `state` what would be restored; items are the dict's own
    """

    name = "?"

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.args, record.state, record.members = args, None, []
        return record

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        self.members.append(item)

    def extend(self, items: list) -> None:
        self.members.extend(items)

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Reader(pickle.Unpickler):
    """One pickle of a torch archive. `storage(key)` gives the bytes that a tensor is made of."""

    def __init__(self, file, storage):
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str):
        """Never imports: a function of ours, a torch type, or a new class of records."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        whole = f"{module}.{name}"
        known = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "builtins.set": set,
            "builtins.frozenset": frozenset,
            "_codecs.encode": self._encode,
        }
        if whole in known:
            return known[whole]
        if module in ("torch", "torch.storage"):
            if name in STORAGES:
                return STORAGES[name]
            if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
        if runs_something(module, name):
            raise Refused(f"it names {whole}, which no file of weights needs")
        return type("Record", (Record,), {"name": whole})

    def persistent_load(self, pid):
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise Refused(f"it refers to a {kind!r}, not to a tensor's values")
        return dtype, self.storage(key)

    def _tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> Tensor:
        dtype, values = storage
        return _view(values, dtype, offset, size, stride)

    def _typed_tensor(self, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Tensor:
        return _view(storage[1], dtype, offset, size, stride)

    def _parameter(self, data, requires_grad=True, hooks=None) -> Tensor:
        return data

    def _encode(self, text, encoding="latin1") -> bytes:  # how protocol 2 writes bytes
        return text.encode("latin1")


def _view(values: Tensor, dtype: torch.dtype, offset: int, size, stride) -> Tensor:
    """values (bytes) as a tensor; torch refuses sizes that reach beyond them."""
    if not values.numel():
        if math.prod(size):
            raise Refused(f"a tensor of shape {tuple(size)} has no values")
        return torch.empty(size, dtype=dtype)
    return values.view(dtype).as_strided(tuple(size), tuple(stride), offset)


def runs_something(module: str, name: str) -> bool:
    """Is this a name of Python's own library, other than of plain data?"""
    if module == "builtins":
        return name not in PLAIN
    return module.partition(".")[0] in sys.stdlib_module_names and not {module, f"{module}.{name}"} & DATA


def read_archive(path: Path) -> Any:
    """The object in a file of torch.save's zip form. Raises Refused, and what zipfile and pickle raise."""
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise Refused("it is a zip file, but none of torch's: it lacks data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise Refused("its numbers are stored in the other byte order")
        cache: dict[str, Tensor] = {}

        def storage(key) -> Tensor:
            if key not in cache:
                content = bytearray(archive.read(f"{root}data/{key}"))
                cache[key] = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0)
            return cache[key]

        with archive.open(pickles[0]) as file:
            return Reader(file, storage).load()
