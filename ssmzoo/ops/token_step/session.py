"""Tokens one after the other through one program whose states stay where they are (token_step.c): from ids to logits in
one native call, which allocates nothing and of which all arguments but the ids are made once."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import torch
from torch import Tensor

from ssmzoo.ops import native
from ssmzoo.ops.eager import eager
from ssmzoo.ops.mamba_step.c import MAX_ROWS
from ssmzoo.ops.token_step import Program, flat, layout, rebuilt
from ssmzoo.ops.token_step.c import ARGUMENTS, pack_program

DECODE, MISSING = native.kernel("ssmzoo_decode")
SLOT, GROWN = struct.Struct("6q"), struct.Struct("5q")
THREADS, REFUSED = 9 * 8, 13 * 8  # where in the arguments
LINE = 64  # bytes
ROOM = 256  # entries, at least, that a growing state gets beyond those it has


def why_not(program: Program, state: Any) -> str | None:
    """Why a program cannot run over a state of its own."""
    if MISSING is not None:
        return MISSING
    if program.packed is None:
        program.packed = pack_program(program)
    if program.packed[0] is not None:
        return program.packed[0]
    try:
        tensors = flat(state, [])
    except TypeError:
        return "takes states of tensors alone"
    rows = tensors[0].shape[0] if tensors else 0
    if not 0 < rows <= MAX_ROWS:
        return f"serves up to {MAX_ROWS} sequences, got {rows}"
    if len(tensors) != len(program.states) or not eager(*tensors):
        return "the state is not one of this program"
    for spec, t in zip(program.states, tensors):
        rest = t.shape[1:] if spec.like is None else t.shape[2:]
        same = spec.like is None or t.shape[1] == tensors[spec.like].shape[1] <= (spec.most or t.shape[1])
        if rest != spec.shape or not same or t.shape[0] != rows or t.dtype is not spec.dtype or not t.is_cpu:
            return f"the state has {tuple(t.shape)} of {t.dtype} where the program has {spec.shape} of {spec.dtype}"
    return None


class Session:
    """A program from ids to logits and the state behind its last token.

    program   its first instruction embeds, its last makes `vocabulary` logits
    state     copied: the caller's is left alone
    """

    def __init__(self, program: Program, state: Any, vocabulary: int):
        tensors, self.program = flat(state, []), program
        if program.layout is None:
            program.layout = layout(state)
        self.rows = tensors[0].shape[0]
        self.logits = torch.empty(self.rows, vocabulary)
        self.slots = ctypes.create_string_buffer(SLOT.size * len(tensors))
        self.shapes = [t.shape for t in tensors]
        sizes = [t.numel() * t.element_size() for t in tensors]
        fixed = [spec.like is None for spec in program.states]
        self.block = torch.empty(sum(_lines(size) for size, one in zip(sizes, fixed) if one), dtype=torch.uint8)
        native.commit(self.block)
        self.grown, at = [], self.block.data_ptr()
        for number, (spec, t, size) in enumerate(zip(program.states, tensors, sizes)):
            if spec.like is not None:
                self.grown.append((number, spec, _with_room(t, spec.most)))
                continue
            t = t if t.is_contiguous() else t.contiguous()
            ctypes.memmove(at, t.data_ptr(), size)
            SLOT.pack_into(self.slots, number * SLOT.size, at, at, 0, 0, 0, 0)
            at += _lines(size)
        self.growth = ctypes.create_string_buffer(max(1, GROWN.size * len(self.grown)))
        for i, (number, spec, buffer) in enumerate(self.grown):
            self._place(i, number, spec, buffer, tensors[number].shape[1])
        self.left = self._left()
        code_at, slots_at, growth_at = map(ctypes.addressof, (program.packed[1], self.slots, self.growth))
        sizes = self.rows, program.code[0].out.size, len(program.code), program.floats, torch.get_num_threads()
        grown = growth_at, len(self.grown), 0
        self.arguments = ctypes.create_string_buffer(
            ARGUMENTS.pack(code_at, slots_at, 0, self.logits.data_ptr(), 0, *sizes, 0, *grown)
        )

    def _place(self, i: int, number: int, spec, buffer: Tensor, length: int) -> None:
        """Tell where a growing state lies, from the beginning of its buffer on."""
        data, capacity, entry = buffer.data_ptr(), buffer.shape[1], buffer[0, 0].numel() * buffer.element_size()
        kept = min(length + 1, spec.most) if spec.most else length + 1
        slot = data, data + (length + 1 - kept) * entry, length, kept, capacity, capacity
        SLOT.pack_into(self.slots, number * SLOT.size, *slot)
        GROWN.pack_into(self.growth, i * GROWN.size, number, data, capacity, spec.most, entry)

    def _left(self) -> int:
        """Tokens for which there is room; negative: without end."""
        return min((b.shape[1] - self._extent(n)[1] for n, spec, b in self.grown if not spec.most), default=-1)

    def _extent(self, number: int) -> tuple[int, int]:
        """Address and number of a growing state's entries."""
        before, _, length, *_ = SLOT.unpack_from(self.slots, number * SLOT.size)
        return before, length

    def _grow(self) -> None:
        for i, (number, spec, buffer) in enumerate(self.grown):
            if not spec.most:
                _, length = self._extent(number)
                self.grown[i] = number, spec, _with_room(buffer[:, :length], 0)
                self._place(i, *self.grown[i], length)
        self.left = self._left()

    def advance(self, token: Tensor) -> Tensor:
        """token (b) int64 -> logits (b v), which the next call overwrites. IndexError for ids without a row."""
        if self.left == 0:
            self._grow()
        struct.pack_into("2q", self.arguments, THREADS, torch.get_num_threads(), token.data_ptr())
        DECODE(self.arguments)
        if self.arguments[REFUSED] != b"\0":
            raise IndexError(f"token ids {token.tolist()} are not all rows of the embedding")
        self.left -= 1
        return self.logits

    def state(self) -> Any:
        """The state now, in tensors that the next call overwrites."""
        buffers, found = {number: buffer for number, _, buffer in self.grown}, []
        for number, (spec, shape) in enumerate(zip(self.program.states, self.shapes)):
            before, length = self._extent(number)
            if number in buffers:
                buffer = buffers[number]
                start = (before - buffer.data_ptr()) // (buffer[0, 0].numel() * buffer.element_size())
                found.append(buffer[:, start : start + length])
            else:
                start, size = before - self.block.data_ptr(), shape.numel() * spec.dtype.itemsize
                found.append(self.block[start : start + size].view(spec.dtype).view(shape))
        return rebuilt(found, self.program.layout)


def _lines(size: int) -> int:
    """Bytes rounded up to whole lines of cache."""
    return -(-size // LINE) * LINE


def _with_room(t: Tensor, most: int) -> Tensor:
    """(b s ...) in a buffer with room for more entries; most: that are kept (0: all)"""
    buffer = t.new_empty(t.shape[0], (2 * most if most else 2 * t.shape[1]) + ROOM, *t.shape[2:])
    buffer[:, : t.shape[1]] = t
    return buffer
