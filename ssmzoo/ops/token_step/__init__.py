"""One token through a stack of layers: what decoding is, as one operator.

Between operators of single layers the threads part and meet again, and Python looks after each of them; of a small
model that is most of a token's time. Here the layers are a program, a list of instructions over registers (vectors of
every sequence) that is made once and stays good while the modules do (`ssmzoo.layers.one_call`).

    linear     out (+)= f act(M a + bias)             norm       RMSNorm or LayerNorm, per group of channels
    mix        out = f0 w1 act(a) b + f1 w0 c         conv       act(causal depthwise convolution)
    mamba, mamba2   whole mixers                      attend     one query more, over all keys or a window
    taylor, ssd, delta, recur, rglru, element         recurrences of constant size
    moe        a router and its experts               keys       product keys: values, or one-neuron experts
    chunk, workspace                                  sums over chunks of tokens, and slots that they write to

Letters: b batch, d model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmzoo.ops.dispatch import op
from ssmzoo.ops.stack_step import Integers

KINDS = ("linear", "norm", "mix", "conv", "mamba", "mamba2", "attend", "taylor", "ssd", "delta", "recur", "rglru")
KINDS += ("element", "moe", "keys", "chunk", "workspace")
ACTIVATIONS = ("none", "relu", "silu", "sigmoid", "gelu", "gelu_tanh")
PARTS = ("rms_norm", "mamba_step", "mamba2_step", "gated_delta_step", "causal_conv1d_update", "causal_conv1d_fn")
PARTS += ("ssd_state_update", "gated_linear_recurrence", "taylor_attention", "linear_act", "grouped_matmul")


Matrix = Tensor | Integers


class MambaWeights(NamedTuple):
    """The weights of `mamba_step`; matrices may be `Integers`, conv_weight may be (e 1 k)."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Matrix
    dt_proj: Matrix
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    in_proj: Matrix
    in_bias: Tensor | None
    out_proj: Matrix
    out_bias: Tensor | None


class Mamba2Weights(NamedTuple):
    """The weights and numbers of `mamba2_step`; matrices may be `Integers`, conv_weight (c 1 k)."""

    in_proj: Matrix
    conv_weight: Tensor
    conv_bias: Tensor | None
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
    layer: MambaWeights | Mamba2Weights | None = None


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


def flat(state: Any, into: list[Tensor]) -> list[Tensor]:
    """The tensors of a nested state in order."""
    for value in state.values() if type(state) is dict else state:
        if isinstance(value, Tensor):
            into.append(value)
        elif value is not None:
            flat(value, into)
    return into


def rebuilt(state: Any, tensors: Iterator[Tensor]) -> Any:
    """A state like another with other tensors."""
    if isinstance(state, Tensor):
        return next(tensors)
    if state is None:
        return None
    if type(state) is dict:
        return {key: rebuilt(value, tensors) for key, value in state.items()}
    values = [next(tensors) if isinstance(value, Tensor) else rebuilt(value, tensors) for value in state]
    return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
