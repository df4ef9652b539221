"""Argument checks that the operators share: one ValueError naming the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def expect(name: str, tensor: Tensor | None, axes: Sequence[str], sizes: dict[str, int]) -> None:
    """Check that `tensor`, unless None, has these axes; sizes of axes seen for the first time go into `sizes`."""
    if tensor is not None and not _fits(tensor.shape, axes, sizes):
        raise _misfit(name, tensor, axes, sizes)


def expect_floats(a: tuple, sizes: dict[str, int], /, **tensors: Sequence[str]) -> dict[str, int]:
    """Check the tensors of `a` that the keywords name, unless None.

    They hold real floating-point numbers, lie where the first argument lies and have these axes, written as letters or
    as a tuple of longer names ("bl", ("b", "l-1")); any axes for "...".

    Returns `sizes`, into which the sizes of new axes go.
    """
    device = a[0].device
    for name, axes in tensors.items():
        tensor = getattr(a, name)
        if tensor is None:
            continue
        if axes != "..." and not _fits(tensor.shape, axes, sizes):
            raise _misfit(name, tensor, axes, sizes)
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}, where the first argument lies")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected float32, float64, bfloat16 or float16")
    return sizes


def _fits(shape: torch.Size, axes: Sequence[str], sizes: dict[str, int]) -> bool:
    if len(shape) != len(axes):
        return False
    for axis, size in zip(axes, shape):
        if sizes.setdefault(axis, size) != size:
            return False
    return True


def _misfit(name: str, tensor: Tensor, axes: Sequence[str], sizes: dict[str, int]) -> ValueError:
    wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
    return ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({wanted})")


def expect_one_device(a: tuple) -> None:
    """Check that all tensors of `a` lie where its first one does."""
    for name, tensor in zip(a._fields, a):
        if isinstance(tensor, Tensor) and tensor.device != a[0].device:
            raise ValueError(f"{name} is on {tensor.device}, expected {a[0].device}, where the first argument lies")


def expect_seq_idx(seq_idx: Tensor | None, device: torch.device, sizes: dict[str, int]) -> None:
    """Check an integer (b, l) sequence index."""
    if seq_idx is None:
        return
    expect("seq_idx", seq_idx, ("b", "l"), sizes)
    if seq_idx.device != device:
        raise ValueError(f"seq_idx is on {seq_idx.device}, expected {device}")
    if seq_idx.is_floating_point() or seq_idx.is_complex() or seq_idx.dtype == torch.bool:
        raise ValueError(f"seq_idx has dtype {seq_idx.dtype}, expected an integer dtype such as int32")


def resets(seq_idx: Tensor) -> Tensor:
    """(b, l) bool: True where a new sequence starts, i.e. the index differs from the position before; never at 0."""
    changed = torch.zeros(seq_idx.shape, dtype=torch.bool, device=seq_idx.device)
    changed[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return changed


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is, otherwise float32: the precision in which recurrences run and states are kept."""
    doubles = (torch.float64, torch.complex128)
    return torch.float64 if any(t is not None and t.dtype in doubles for t in tensors) else torch.float32


def why_not_float(*tensors: Tensor | None) -> str | None:
    """The reason when a tensor is not one of the floating-point kinds that compiled kernels read and write."""
    for t in tensors:
        if t is not None and t.dtype not in FLOATS:
            return f"computes in float32 from float32, bfloat16 or float16, got {str(t.dtype).removeprefix('torch.')}"
    return None
