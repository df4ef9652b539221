"""How layers write themselves down as instructions of `ssmzoo.ops.token_step`, for one token of every sequence.

A layer that can has a method

    program(p: Builder, x: Register) -> y        p.state(...) for every tensor of its state, in the state's order

beside `forward`, the same computation; it raises `NotPlain` where a module is to be called instead. A class whose
forward is another's has a `program` of its own, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.feedforward.mlp import ACTIVATIONS as FUNCTIONS_BY_NAME
from ssmzoo.layers.hadamard import order, special_factor
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.quantized import QuantizedConv1d, QuantizedEmbedding, QuantizedLinear, Rounding, SeparateExperts
from ssmzoo.ops.stack_step import Integers
from ssmzoo.ops.token_step import ACTIVATIONS, Convolution, ExpertWeights, Instruction, Program, Register, StateSpec

LINEARS = frozenset({nn.Linear, QuantizedLinear})
CONVS = frozenset({nn.Conv1d})
BYTE_CONVS = frozenset({QuantizedConv1d})
ROUNDINGS = frozenset({Rounding})
EMBEDDINGS = frozenset({nn.Embedding, QuantizedEmbedding})
NORMS = frozenset({nn.LayerNorm})
FUNCTIONS = {F.relu: "relu", F.gelu: "gelu", F.silu: "silu", torch.sigmoid: "sigmoid", Tensor.sigmoid: "sigmoid"}
EXPERTS = ("Experts", "SeparateExperts")
ADDING = {"linear": 1, "mamba": 1, "mamba2": 1, "moe": 6}  # instructions that may add to `out`: the number that says so


class NotPlain(Exception):
    """A module is to be called, so there is no program."""


class Builder:
    """Registers, states and instructions of a program; register `x` is the residual stream."""

    def __init__(self, width: int):
        self.code: list[Instruction] = []
        self.states: list[StateSpec] = []
        self.x = Register(0, 0, width, width)
        self.free = self.floats = width
        self.roots: list[nn.Module] = []  # whose changes end the program
        self.losses: list[tuple[int, bool, bool]] = []  # of every router: experts, whether it has balance and z losses

    def need(self, *conditions: Any) -> None:
        if not all(conditions):
            raise NotPlain

    def use(self, module: nn.Module, among: frozenset[type] | None = None) -> nn.Module:
        """The module, which is of a class of `among`, or has a method `program` of its class's own."""
        if among is None:
            self.need("program" in type(module).__dict__)
        self.need(not module.training, is_plain(module, among=among or {type(module)}))
        return module

    def reg(self, size: int) -> Register:
        register = Register(self.free, 0, size, size)
        self.free += size
        self.floats = max(self.floats, self.free)
        return register

    def state(self, *shape: int, dtype: torch.dtype = torch.float32, like: int | None = None, most: int = 0) -> int:
        """The number of the next state (b *shape), or (b s *shape) with the s of state `like` (itself: -1)."""
        number = len(self.states)
        self.states.append(StateSpec(shape, dtype, number if like == -1 else like, most))
        return number

    def emit(self, kind: str, out: Register, *registers: Register, **more: Any) -> Register:
        self.code.append(Instruction(kind, out, *registers, **more))
        return out

    def act(self, function: Callable) -> str:
        """The name of an activation function."""
        name = FUNCTIONS.get(function)
        self.need(name is not None)
        return name

    # ---- what layers consist of ----

    def linear(self, linear: nn.Module, x: Register, act: str = "none", out: Register | None = None) -> Register:
        self.need(is_plain(linear, among=LINEARS))
        weight = matrix(linear, rotated=True, eight=True)
        if rotates(linear):
            x = self.rotate(x)
        self.need(weight is not None, linear.in_features == x.size)
        out = self.reg(linear.out_features) if out is None else out
        numbers = (ACTIVATIONS.index(act), 0)
        return self.emit("linear", out, x, matrix=(weight, linear.bias), numbers=numbers, factors=(1.0,))

    def rotate(self, x: Register, inverse: bool = False) -> Register:
        """x T, or x T^T (`ssmzoo.layers.hadamard`)"""
        self.need(order(x.size) is not None)
        special = special_factor(x.size)
        return self.emit("hadamard", self.reg(x.size), x, weights=(special,), numbers=(len(special), inverse))

    def norm(self, norm: nn.Module, x: Register) -> Register:
        """A norm over all channels: any module with a method `program`, or torch's LayerNorm."""
        if not is_plain(norm, among=NORMS):
            return self.use(norm).program(self, x)
        self.need(norm.normalized_shape == (x.size,))
        return self.normalise(x, norm.weight, norm.bias, norm.eps, layer=True)

    def normalise(self, x: Register, weight: Tensor | None, bias: Tensor | None, eps: float, **kind: Any) -> Register:
        """kind: layer, a LayerNorm, or 2, a CentredNorm whose ones are in the place of a bias; group, channels that
        are normalised together; shared, by the same weights"""
        group = kind.get("group") or x.size
        numbers = (kind.get("layer", 0), group, kind.get("shared", False))
        self.need(weight is not None, weight.numel() == (group if kind.get("shared") else x.size))
        return self.emit("norm", self.reg(x.size), x, weights=(weight, bias), numbers=numbers, factors=(eps,))

    def mix(
        self,
        a: Register,
        b: Register | None = None,
        c: Register | None = None,
        act: str = "none",
        out: Register | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
        weights: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Register:
        """f0 w1 act(a) b + f1 w0 c, element by element; w1 is one number"""
        registers = (a, b or Register(), c or Register())
        self.need(all(r.size in (0, a.size) for r in registers))
        out = self.reg(a.size) if out is None else out
        return self.emit("mix", out, *registers, weights=weights, numbers=(ACTIVATIONS.index(act),), factors=factors)

    def add(self, x: Register, y: Register, factor: float = 1.0) -> None:
        """x += factor y; where y is the result of a product, by the product itself"""
        last = self.code[-1]
        at = ADDING.get(last.kind)
        if at is None or last.out != y or last.numbers[at] or (factor != 1 and last.kind != "linear"):
            self.mix(y, c=x, out=x, factors=(factor, 1.0))
            return
        numbers = (*last.numbers[:at], 1, *last.numbers[at + 1 :])
        factors = (factor,) if last.kind == "linear" else last.factors
        self.code[-1] = last._replace(out=x, numbers=numbers, factors=factors)

    def conv(self, conv: nn.Module, x: Register, act: str = "silu") -> Register:
        """A causal depthwise convolution and its state."""
        self.need(is_plain(conv, among=CONVS), conv.groups == conv.in_channels == conv.out_channels == x.size)
        taps = conv.kernel_size[0]
        numbers, states = (ACTIVATIONS.index(act), taps), (self.state(x.size, taps),)
        weights = (conv.weight, conv.bias)
        return self.emit("conv", self.reg(x.size), x, weights=weights, numbers=numbers, states=states)

    def kv_states(self, heads: int, width: int, window: int = 0) -> tuple[int, int, int]:
        """Keys, values and positions, of all tokens or of a window that counts the newest."""
        most = max(1, window - 1) if window else 0
        k = self.state(heads, width, like=-1, most=most)
        v = self.state(heads, width, like=k, most=most)
        return k, v, self.state(dtype=torch.int64, like=k, most=most)

    def attend(
        self,
        q: Register,
        k: Register,
        v: Register,
        heads: tuple[int, int, int],
        strides: tuple[int, int, int],
        rope: tuple[int, float],
        scale: float | None = None,
        window: int = 0,
        out: Register | None = None,
        states: tuple[int, ...] | None = None,
        bias: tuple[Register, Tensor] | None = None,
    ) -> Register:
        """heads: of queries, of keys, and their width; strides: from head to head of q, k, v; rope: channels that turn
        and the base; bias: dt and A of `DynamicMaskAttention`, whose state stands behind the others"""
        h, j, width = heads
        self.need(h * width == (out or Register(size=h * width)).size)
        out = self.reg(h * width) if out is None else out
        if states is None:
            states = self.kv_states(j, width, window)
        dt, weights = Register(), (self.frequencies(*rope), None)
        if bias is not None:
            dt, weights, states = bias[0], (weights[0], bias[1]), (*states, self.state(h, like=states[0]))
        numbers, scale = (h, j, width, *strides, window, rope[0]), width**-0.5 if scale is None else scale
        more = dict(weights=weights, numbers=numbers, factors=(scale,), states=states)
        return self.emit("attend", out, q, k, v, dt, **more)

    def frequencies(self, width: int, base: float) -> Tensor | None:
        """Radians per token, as in `rope_table`."""
        return base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width) if width else None

    def ssd(
        self,
        x: Register,
        B: Register,
        C: Register,
        heads: tuple[int, int, int],
        strides: tuple[int, int, int],
        A: Tensor,
        states: tuple[int, ...],
        decay: str = "constant",
        dt: Register | None = None,
        rope: tuple[int, float] = (0, 1.0),
    ) -> Register:
        """heads: their number, channels and state; strides: from head to head of x, B, C; decay: exp(-A) (constant),
        exp(-dt exp(A)) (neg_exp) or exp(dt A) (raw), dt before its softplus; rope: of B and C"""
        h, width, n = heads
        numbers = (h, width, n, *strides, ("constant", "neg_exp", "raw").index(decay), rope[0])
        more = dict(weights=(A, self.frequencies(*rope)), numbers=numbers, states=states)
        return self.emit("ssd", self.reg(h * width), x, B, C, dt or Register(), **more)

    def gated_norm(self, norm: nn.Module, y: Register, z: Register) -> Register:
        """A `GatedRMSNorm`, over all channels or per head of them."""
        self.need(type(norm).__name__ == "GatedRMSNorm", is_plain(norm, among={type(norm)}))
        act, size = self.act(norm.activation), norm.weight.numel()
        group, shared = (norm.group_size, False) if size == y.size else (size, True)
        if not norm.norm_before_gate:
            return self.normalise(self.mix(z, y, act=act), norm.weight, None, norm.eps, group=group, shared=shared)
        return self.mix(z, self.normalise(y, norm.weight, None, norm.eps, group=group, shared=shared), act=act)

    def product_keys(
        self, keys: nn.Module, queries: Register, out: Register, x: Register | None, values: tuple[Tensor, ...]
    ) -> Register:
        """`ProductKeys` over queries (2 h r): out is the sum of the values of what is found, or, with x, it grows by
        its one-neuron experts."""
        self.need(type(keys).__name__ == "ProductKeys", is_plain(keys, among={type(keys)}))
        (h, n1, half), n2 = keys.keys1.shape, keys.keys2.shape[1]
        self.need(queries.size == 2 * h * half, all(v.shape[1] == (x or out).size for v in values))
        numbers = (n1, n2, half, keys.top_k, h, keys.all_pairs, x is not None)
        weights = (keys.keys1, keys.keys2, *values)
        return self.emit("keys", out, queries, x or Register(), weights=weights, numbers=numbers)

    def experts(self, moe_router: nn.Module, experts: nn.Module, x: Register, of: Register, **how: Any) -> Register:
        """Token choice by `of` among plain experts of x. how: scale of the logits; flags, whose second makes them 0"""
        r, e, scale = moe_router, experts, how.get("scale", 1.0)
        self.need(type(r).__name__ == "TokenChoice", type(e).__name__ in EXPERTS, e.activation is not None)
        self.need(is_plain(r, among={type(r)}), is_plain(e, among={type(e)}), r.eval_capacity_factor is None)
        self.need(not r.training, not e.training, not r.penalty_weight, r.gate.dtype is torch.float32)
        apart, activation = type(e) is SeparateExperts, e.activation
        if apart:
            n, d, f, o, activation = e.n_experts, e.d_model, e.d_expert, e.d_output, FUNCTIONS_BY_NAME[e.activation]
        else:
            (n, d, f), o = e.lin1_weight.shape, e.lin2_weight.shape[2]
        act = ACTIVATIONS.index(self.act(activation))
        numbers = (n, f, o, r.top_k, r.renormalise, act, 0, len(self.losses), 0, d)
        self.losses.append((n, bool(r.balance_weight), bool(r.z_loss_weight)))
        weights = (r.gate, r.gate_bias, *(() if apart else (e.lin1_weight, e.lin2_weight, e.gate_weight)))
        layer = ExpertWeights(*map(self.bank, (e.lin1, e.lin2, e.gate))) if apart else None
        more = dict(
            layer=layer, numbers=numbers, factors=(scale, r.balance_weight, r.z_loss_weight, 1.0), weights=weights
        )
        return self.emit("moe", self.reg(o), x, of, how.get("flags", Register()), **more)

    def bank(self, linears: nn.ModuleList | None) -> tuple[tuple[Tensor | Integers, Tensor | None], ...]:
        """The matrices and biases of linear maps, one per expert."""
        pairs = tuple((matrix(linear, eight=True), linear.bias) for linear in linears or ())
        self.need(all(weight is not None for weight, _ in pairs))
        return pairs

    def chunk(self, x: Register, size: int) -> tuple[Register, Register]:
        """`chunks`: the sum over the chunk before the token's, and three flags."""
        states = self.state(x.size), self.state(x.size), self.state(dtype=torch.int64)
        flags = self.reg(3)
        return self.emit("chunk", self.reg(x.size), x, Register(), flags, numbers=(size,), states=states), flags

    def gated_add(self, x: Register, gate: Register, y: Register) -> None:
        """x += gate y, the gate one number"""
        self.need(gate.size == 1)
        self.emit("mix", x, y, gate, x, factors=(1.0, 1.0))

    def workspace(
        self,
        x: Register,
        sums: Register,
        flags: Register,
        start: Tensor,
        linears: tuple[nn.Linear, ...],
        norm: nn.LayerNorm,
        states: tuple[int, int],
        chunk: int,
    ) -> None:
        """x += what its chunk reads of a `Workspace`; linears: gate, q, k, v, o"""
        gate, q, k, v, o = linears
        weights = (start, gate.weight, gate.bias, norm.weight, q.weight, norm.bias, k.weight, v.weight)
        numbers = (start.shape[0], q.out_features, chunk)
        more = dict(matrix=(o.weight, None), weights=weights, numbers=numbers, factors=(norm.eps,), states=states)
        self.emit("workspace", x, x, sums, flags, **more)

    # ---- the whole ----

    def embed(self, embedding: nn.Module) -> None:
        """x begins as a token's row of a table."""
        self.need(is_plain(embedding, among=EMBEDDINGS), embedding.max_norm is None)
        table = embedding.weight
        if type(embedding) is QuantizedEmbedding:
            table = Integers(table, embedding.scale, embedding.bits, embedding.group_size)
        self.need(
            embedding.embedding_dim == self.x.size, in_one_call(table if isinstance(table, Tensor) else table.scale)
        )
        self.emit("embed", self.x, matrix=(table, None))

    def logits(self, head: nn.Module) -> None:
        """What the program returns instead of x."""
        self.linear(head, self.x, out=Register())
        last = self.code[-1]
        self.code[-1] = last._replace(numbers=(*last.numbers, 1))

    def program(self, layers: Callable) -> Program:
        routers, code = len(self.losses), self.code
        if not routers:
            return Program(code, self.states, self.floats, layers)
        self.need(len(set(self.losses)) == 1)
        count = [i if i.kind != "moe" else i._replace(numbers=(*i.numbers[:8], routers, i.numbers[9])) for i in code]
        return Program(count, self.states, self.floats, layers, (routers, *self.losses[0]))


def in_one_call(weight: Tensor) -> bool:
    """Whether one operator for all layers takes weights of this kind: fp32, on a GPU 16 bits as well."""
    return weight.dtype is torch.float32 or weight.is_cuda and weight.is_floating_point()


def rotates(linear: nn.Module) -> bool:
    """Whether a quantised linear map rotates what enters it."""
    return type(linear) is QuantizedLinear and linear.rotate


def special_of(linear: nn.Module) -> Tensor | None:
    """The special factor of that rotation, None for none."""
    return special_factor(linear.in_features) if rotates(linear) else None


def matrix(linear: nn.Module, rotated: bool = False, eight: bool = False) -> Tensor | Integers | None:
    """The weights of a plain linear map as `token_step` takes them; None if it is more than a product.

    rotated: what enters it is rotated beforehand where it asks for that (`rotates`)
    eight: it may round to 8 bits what enters and what comes out
    """
    if not is_plain(linear, among=LINEARS):
        return None
    if type(linear) is nn.Linear:
        return linear.weight if in_one_call(linear.weight) else None
    if linear.scale.dtype is not torch.float32 or linear.rotate and not rotated:
        return None
    rounding, plain = linear.output, (linear.weight, linear.scale, linear.bits, linear.group_size)
    if linear.activation == "float" and rounding is None:
        return Integers(*plain)
    if not eight or rounding is not None and not is_plain(rounding, among=ROUNDINGS):
        return None
    return Integers(*plain, linear.activation, linear.act_scale, None if rounding is None else rounding.scale)


def convolution(conv: nn.Module) -> Convolution | None:
    """The weights of a mixer's convolution with SiLU behind it; None if it is something else."""
    if is_plain(conv, among=CONVS):
        return Convolution(conv.weight, conv.bias)
    if not is_plain(conv, among=BYTE_CONVS):
        return None
    rounding = conv.output
    if rounding is not None and not is_plain(rounding, among=ROUNDINGS):
        return None
    return Convolution(
        conv.weight, conv.bias, conv.scale, conv.bias_scale, None if rounding is None else rounding.scale
    )
