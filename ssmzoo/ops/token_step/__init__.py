"""One token through a stack of layers: what decoding is, as one operator.

Between operators of single layers the threads part and meet again, and Python looks after each of them; of a small
model that is most of a token's time. Here the layers are a program, a list of instructions over registers (vectors of
every sequence) that is made once and stays good while the modules do (`ssmzoo.layers.one_call`).

    linear     out (+)= f act(M a + bias)             norm       RMSNorm or LayerNorm, per group of channels
    mix        out = f0 w1 act(a) b + f1 w0 c         conv       act(causal depthwise convolution)
    mamba, mamba2   whole mixers                      attend     one query more, over all keys or a window
    taylor, ssd, delta, recur, rglru, element, mamba3   recurrences of constant size
    moe        a router and its experts               keys       product keys: values, or one-neuron experts
    chunk, workspace                                  sums over chunks of tokens, and slots that they write to
    hadamard   out = a T, or a T^T (`ssmzoo.layers.hadamard`)
    embed      a row of a table, of floats or integers, for every sequence's token

Letters: b batch, d model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import op
from ssmzoo.ops.stack_step import Integers

KINDS = ("linear", "norm", "mix", "conv", "mamba", "mamba2", "attend", "taylor", "ssd", "delta", "recur", "rglru")
KINDS += ("element", "moe", "keys", "chunk", "workspace", "mamba3", "hadamard", "embed")
ACTIVATIONS = ("none", "relu", "silu", "sigmoid", "gelu", "gelu_tanh")
PARTS = ("rms_norm", "mamba_step", "mamba2_step", "gated_delta_step", "causal_conv1d_update", "causal_conv1d_fn")
PARTS += ("ssd_state_update", "gated_linear_recurrence", "taylor_attention", "linear_act", "grouped_matmul")
PARTS += ("mamba3_step",)


Matrix = Tensor | Integers


class Convolution(NamedTuple):
    """Of a mixer, with SiLU behind it: weight (c 1 k) and bias (c) of floats, or of int8 with scales (c) each; rounded
    (c): scales by which what comes out is rounded to 8 bits."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    bias_scale: Tensor | None = None
    rounded: Tensor | None = None


class MambaWeights(NamedTuple):
    """The weights of `mamba_step`; matrices may be `Integers`.

    special   (s s) special factor of the Hadamard matrix by which what enters out_proj is rotated; None: it is not
    """

    conv: Convolution
    x_proj: Matrix
    dt_proj: Matrix
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    in_proj: Matrix
    in_bias: Tensor | None
    out_proj: Matrix
    out_bias: Tensor | None
    special: Tensor | None = None


class Mamba2Weights(NamedTuple):
    """The weights and numbers of `mamba2_step`; matrices may be `Integers`, special as above."""

    in_proj: Matrix
    conv: Convolution
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor | None
    out_proj: Matrix
    in_bias: Tensor | None
    out_bias: Tensor | None
    ngroups: int
    gate_eps: float
    dt_min: float
    dt_max: float
    heads: tuple[int, int, int]  # h, p, n
    special: Tensor | None = None


class ExpertWeights(NamedTuple):
    """The matrices and biases of separate experts, a pair per expert each; gate is empty where there is none."""

    lin1: tuple[tuple[Matrix, Tensor | None], ...]
    lin2: tuple[tuple[Matrix, Tensor | None], ...]
    gate: tuple[tuple[Matrix, Tensor | None], ...]


class Register(NamedTuple):
    """A vector per sequence: `size` numbers, `inner` behind the beginning of a block of `ld`, itself at `base`."""

    base: int = 0
    inner: int = 0
    ld: int = 0
    size: int = 0

    def part(self, start: int, size: int) -> Register:
        if start + size > self.size:
            raise ValueError(f"register of {self.size} numbers has no part from {start} to {start + size}")
        return Register(self.base, self.inner + start, self.ld, size)

    def split(self, *sizes: int) -> list[Register]:
        return [self.part(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


class Instruction(NamedTuple):
    """kind of KINDS, registers, and what the kernel of the kind reads (token_step.c and the files beside it)."""

    kind: str
    out: Register
    a: Register = Register()
    b: Register = Register()
    c: Register = Register()
    d: Register = Register()
    matrix: tuple[Matrix, Tensor | None] | None = None
    weights: tuple[Tensor | None, ...] = ()
    numbers: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()
    states: tuple[int, ...] = ()
    layer: MambaWeights | Mamba2Weights | ExpertWeights | None = None


class StateSpec(NamedTuple):
    """A state tensor (b *shape), or (b s *shape) that grows along s up to `most` entries (0: without end); `like` is
    the number of the state whose s it has."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    like: int | None = None
    most: int = 0


@dataclass(eq=False)
class Program:
    """code       the instructions; register 0 is x (b d) on the way in and out
    states     one `StateSpec` per state, in the order of the flat list of states
    floats     numbers in all registers, for one sequence
    layers     function (x (b d), states) -> (x, states, aux): the modules themselves
    experts    of the routers: their number, that of their experts, whether they have balance and z losses; or None
    """

    code: list[Instruction]
    states: list[StateSpec]
    floats: int
    layers: Callable[[Tensor, tuple], tuple]
    experts: tuple[int, int, bool, bool] | None = None
    packed: tuple | None = None  # by the kernel
    layout: Layout | None = None  # of the states it has seen
    given: tuple = (None, None)  # states that were looked over last, and their tensors


@op(parts=PARTS)
def token_step(x: Tensor, program: Program, states: tuple) -> tuple[Tensor, tuple, dict[str, Tensor]]:
    """Advance layers by one token; the states given are left alone.

    x        (b d)
    program  the layers
    states   of the layers, nested as these give them
    returns  x (b d) behind the last layer, the new states, and what the routers report (`merge_aux`)

    The definition is the modules that the program was made of, called one by one.
    """
    return program.layers(x, states)


class Layout(NamedTuple):
    """How a nested state is made of `count` tensors: `make` of the parts in order, a tensor each where there is no list
    of layouts; `keys` of a dict; None where the state has None."""

    make: Callable
    count: int
    parts: list[Layout | None | type[Tensor]] | None = None
    keys: tuple | None = None


def layout(state: Any) -> Layout:
    keys = tuple(state) if isinstance(state, dict) else None
    values = list(state.values() if keys is not None else state)
    make = dict if keys is not None else getattr(type(state), "_make", type(state))
    if keys is None and all(isinstance(value, Tensor) for value in values):
        return Layout(make, len(values))
    parts = [Tensor if isinstance(value, Tensor) else value if value is None else layout(value) for value in values]
    count = sum(1 if part is Tensor else part.count for part in parts if part is not None)
    return Layout(make, count, parts, keys)


def flat(state: Any, into: list[Tensor]) -> list[Tensor]:
    """The tensors of a nested state in order, appended."""
    for value in state.values() if type(state) is dict else state:
        if type(value) is Tensor:
            into.append(value)
        elif value is not None:
            flat(value, into)
    return into


def rebuilt(tensors: list[Tensor], how: Layout, start: int = 0) -> Any:
    """The nested state of this layout made of the tensors from `start` on."""
    if how.parts is None:
        return how.make(tensors[start : start + how.count])
    values = []
    for part in how.parts:
        if part is None:
            values.append(None)
        elif part is Tensor:
            values.append(tensors[start])
            start += 1
        else:
            values.append(rebuilt(tensors, part, start))
            start += part.count
    return how.make(values if how.keys is None else zip(how.keys, values))
