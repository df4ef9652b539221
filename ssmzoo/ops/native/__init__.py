"""Our compiled CPU kernels, reached through ctypes: raw pointers, dtypes and strides, nothing of torch's C++.

An operator's kernels lie in its own folder, `<operator>/<operator>.c` beside `<operator>/c.py`; here is the rest.

`KERNELS` is the library for the best instruction set of this machine, or None; `MISSING` then says why and what to do.
SSMZOO_NATIVE=avx2 (or plain, neon, off) asks for a lower one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ssmzoo.ops.native.sources import source_hash

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int64: 4}
PADDING = ((0, 0, 0, 0), (0, 0, 0), (0, 0), (0,), ())  # to four strides
REBUILD = "python -m ssmzoo.ops.native.build"
WINDOWS = "there are no compiled kernels for Windows yet: PyTorch's functions serve; Linux in WSL has the kernels"
LEVELS = ("avx512", "avx2", "neon", "plain")  # best first


def _is_of_sources(library: ctypes.CDLL, operators: Path) -> bool:
    """Was it compiled from the files that lie beside it? Arguments are packed as these expect, not as others did."""
    beside = source_hash(operators)
    carried = getattr(library, "ssmzoo_source_hash", None)
    if carried is not None:
        carried.restype = ctypes.c_char_p
    return not beside or (carried is not None and carried() == beside.encode())


def _load(folder: Path) -> tuple[ctypes.CDLL | None, str, str | None]:
    """(library of a folder, instruction set, why there is none)"""
    wanted = os.environ.get("SSMZOO_NATIVE", "")
    if wanted == "off":
        return None, "", "switched off by SSMZOO_NATIVE=off"
    if wanted and wanted not in LEVELS:
        return None, "", f"SSMZOO_NATIVE={wanted!r}, expected one of {', '.join(LEVELS)} or off"
    found = {level: path for level in LEVELS if (path := folder / f"_kernels.{level}.so").exists()}
    try:
        for path in reversed(found.values()):  # the lowest runs everywhere and knows what the machine supports
            runs_here = ctypes.CDLL(str(path)).ssmzoo_cpu_runs
            break
        for level, path in found.items():
            if (not wanted or wanted == level) and runs_here(level.encode()):
                library = ctypes.CDLL(str(path))
                if not _is_of_sources(library, folder.parent):
                    return None, "", f"the compiled kernels are not those of the sources beside them; run `{REBUILD}`"
                return library, level, None
    except (OSError, AttributeError) as error:
        return None, "", f"{path.name} cannot be used ({error}); rebuild it with `{REBUILD}`"
    if sys.platform == "win32":
        return None, "", WINDOWS
    missing = "are not compiled" if not found else f"are not compiled for {wanted or 'this machine'}"
    return None, "", f"the kernels {missing}; run `{REBUILD}` (needs a C compiler)"


KERNELS, LEVEL, MISSING = _load(Path(__file__).parent)
VECTOR_LENGTH = 1 if KERNELS is None else KERNELS.ssmzoo_vector_length()  # floats


def kernel(name: str, argtypes: list | None = None):
    """(function of the library or None, why it is missing or None); the function takes one int64 array by default."""
    if KERNELS is None:
        return None, MISSING
    function = getattr(KERNELS, name)
    function.argtypes = [ctypes.c_void_p] if argtypes is None else argtypes
    function.restype = None
    return function, None


def _use_torch_threads() -> None:
    """Let torch's OpenMP threads run our tasks (see parallel.c), found by the C interface of that runtime."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if KERNELS is None or not library.exists():
        return
    with contextlib.suppress(OSError, AttributeError):  # torch without OpenMP: our own threads
        KERNELS.ssmzoo_use_team(ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p))


_use_torch_threads()
_COMMIT, _ = kernel("ssmzoo_commit", [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64])
LARGE = 1 << 20  # bytes; smaller blocks are recycled by the allocator


def commit(*tensors: Tensor | None) -> None:
    """Have the memory of large results, which a kernel will fill, ready in one go instead of a page fault per 4 KiB."""
    for t in tensors if _COMMIT is not None else ():
        if t is not None and (size := t.numel() * t.element_size()) >= LARGE:
            _COMMIT(t.data_ptr(), size, torch.get_num_threads())


_GATHER, _ = kernel("ssmzoo_gather", [ctypes.c_void_p, ctypes.c_void_p])
SLAB = 1 << 21  # bytes of a huge page
MUCH = 32 << 20  # bytes; less than this stays in cache, or is soon read


def gather(tensors: Iterable[Tensor]) -> None:
    """Have weights that every token reads from memory lie in huge pages: a core reads them up to twice as fast."""
    spans = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors if t.is_cpu]
    if _GATHER is None or sum(size for _, size in spans) < MUCH:
        return
    slabs = sorted({s for start, size in spans if size for s in range(start // SLAB, (start + size - 1) // SLAB + 1)})
    for slab in slabs:
        _GATHER(slab * SLAB, (slab + 1) * SLAB)


def pack(tensors: list[Tensor | None], *numbers: int) -> bytes:
    """Arguments of a kernel as int64: (pointer, dtype, four strides) per tensor, zeros for None, then the numbers.

    Matches `tensor` in tensor.h. The caller keeps the tensors alive.
    """
    values: list[int] = []
    for t in tensors:
        if t is None:
            values += (0, 0, 0, 0, 0, 0)
        else:
            strides = t.stride()
            values += (t.data_ptr(), DTYPES[t.dtype], *strides, *PADDING[len(strides)])
    values += numbers
    return struct.pack(f"{len(values)}q", *values)
