"""Layers that hold small integers: what `ssmzoo.adapt.quantise` puts in the place of a model's layers.

    QuantizedLinear      y = Q(x [T]) W^T + bias, W of 8 or 4 bits (ops.quantized_linear), perhaps rounded behind
    QuantizedEmbedding   rows of 8 or 4 bits
    QuantizedConv1d      a depthwise convolution of 8 bits, with SiLU and a rounding behind it
    SeparateExperts      a bank of experts as one linear layer each, so that each may be quantised by itself
    Rounding             8-bit integers times a scale per channel: what integer kernels would hand on

Every forward is that of an ordinary module; integers and scales are buffers, under the names a checkpoint stores.
`settings()` are the arguments that build an empty one. Letters: d inputs, e outputs, m groups of inputs, c channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.feedforward.mlp import ACTIVATIONS as FUNCTIONS
from ssmzoo.layers.hadamard import hadamard
from ssmzoo.ops import quantized_linear
from ssmzoo.ops.quantized_linear import DYNAMIC, dequantize, unpack_int4

ACTIVATIONS = ("float", "static", DYNAMIC)


class Rounding(nn.Module):
    """x -> s clamp(round(x / s), -128, 127), one s per channel; halves to even; gradients pass straight.

    scale (dim) | dim: the axis of the channels in x
    """

    def __init__(self, channels: int, dim: int = -1):
        super().__init__()
        self.channels, self.dim = channels, dim
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype)
        scale = scale if self.dim == -1 else scale[:, None]
        q = torch.round(x.detach() / scale).clamp(-128, 127) * scale
        return q + (x - x.detach()) if x.requires_grad else q

    def extra_repr(self) -> str:
        return f"{self.channels}"


class QuantizedLinear(nn.Module):
    """x (... d) -> (... e)

    bits, group_size   of the weight, as in `ssmzoo.ops.quantized_linear`
    activation         float: x as it is; static: int8 by the buffer `act_scale`; dynamic: int8, every token by itself
    rotate             x is rotated first (`ssmzoo.layers.hadamard`), in the way the weight expects
    rounded            the product is rounded to 8 bits by `output`, a Rounding, before the bias is added
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        group_size: int = 128,
        activation: str = "float",
        rotate: bool = False,
        rounded: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation = {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if bits == 4 and in_features % 2:
            raise ValueError(f"4-bit weights are packed in pairs: {in_features} inputs are odd; use 8 bits")
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        self.activation, self.rotate = activation, rotate
        kind, columns = (torch.uint8, in_features // 2) if bits == 4 else (torch.int8, in_features)
        self.register_buffer("weight", torch.zeros(out_features, columns, dtype=kind))
        self.register_buffer("scale", torch.ones(out_features, -(-in_features // group_size)))
        self.register_buffer("act_scale", torch.ones(()) if activation == "static" else None)
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.output = Rounding(out_features) if rounded else None

    def forward(self, x: Tensor) -> Tensor:
        x = hadamard(x) if self.rotate else x
        act_scale = DYNAMIC if self.activation == DYNAMIC else self.act_scale
        bias = self.bias if self.output is None else None
        options = dict(bits=self.bits, group_size=self.group_size, act_scale=act_scale)
        y = quantized_linear(x, self.weight, self.scale, None, bias, **options)
        if self.output is not None:
            y = self.output(y) if self.bias is None else self.output(y) + self.bias.to(y.dtype)
        return y

    def matrix(self) -> Tensor:
        """(e d) in the scale's dtype: what x is multiplied with, its rotation included, its rounding not."""
        W = dequantize(self.weight, self.scale, None, self.bits, self.group_size)
        return W @ hadamard(torch.eye(self.in_features, device=W.device, dtype=W.dtype)).T if self.rotate else W

    def settings(self) -> dict[str, Any]:
        names = ("in_features", "out_features", "bits", "group_size", "activation", "rotate")
        more = {"rounded": self.output is not None, "bias": self.bias is not None}
        return {name: getattr(self, name) for name in names} | more

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings().items())


class QuantizedEmbedding(nn.Embedding):
    """ids (...) -> (... d): rows of integers with m scales each; may share its buffers with a head."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int = 4, group_size: int = 128):
        nn.Module.__init__(self)
        if bits == 4 and embedding_dim % 2:
            raise ValueError(f"4-bit rows are packed in pairs: {embedding_dim} columns are odd; use 8 bits")
        self.num_embeddings, self.embedding_dim, self.bits, self.group_size = (
            num_embeddings,
            embedding_dim,
            bits,
            group_size,
        )
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        kind, columns = (torch.uint8, embedding_dim // 2) if bits == 4 else (torch.int8, embedding_dim)
        self.register_buffer("weight", torch.zeros(num_embeddings, columns, dtype=kind))
        self.register_buffer("scale", torch.ones(num_embeddings, -(-embedding_dim // group_size)))

    def forward(self, ids: Tensor) -> Tensor:
        rows, scale = F.embedding(ids, self.weight), F.embedding(ids, self.scale)
        codes = (unpack_int4(rows) if self.bits == 4 else rows).to(scale.dtype)
        if scale.shape[-1] > 1:
            scale = scale.repeat_interleave(self.group_size, -1)[..., : self.embedding_dim]
        return codes * scale

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_embeddings", "embedding_dim", "bits", "group_size")}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings().items())


class QuantizedConv1d(nn.Module):
    """x (b c l) -> (b c l - k + 1): every channel by its own k taps of 8 bits; no padding.

    scale (c), bias (c) of 8 bits with bias_scale (c) | activate: SiLU and, if `rounded`, 8 bits behind it, which
    `ssmzoo.layers.mixers.short_conv` calls in the place of its own activation
    """

    def __init__(self, channels: int, kernel_size: int, rounded: bool = False, bias: bool = True):
        super().__init__()
        self.channels, self.kernel_size = channels, kernel_size
        self.register_buffer("weight", torch.zeros(channels, 1, kernel_size, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels, dtype=torch.int8) if bias else None)
        self.register_buffer("bias_scale", torch.ones(channels) if bias else None)
        self.output = Rounding(channels, dim=1) if rounded else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None, None]
        bias = None if self.bias is None else self.bias.to(x.dtype) * self.bias_scale.to(x.dtype)
        return F.conv1d(x, weight, bias, groups=self.channels)

    def activate(self, y: Tensor) -> Tensor:
        y = F.silu(y)
        return y if self.output is None else self.output(y)

    def settings(self) -> dict[str, Any]:
        more = {"rounded": self.output is not None, "bias": self.bias is not None}
        return {"channels": self.channels, "kernel_size": self.kernel_size} | more

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings().items())


class SeparateExperts(nn.Module):
    """A bank of experts (`ssmzoo.layers.feedforward.moe.Experts`) whose matrices are modules: lin1, lin2, gate, one per
    expert. rows (r d) sorted by expert, ends (e) -> (r d_output)

    activation   its name; None for linear experts | gated: with gate | bias: lin1 and gate have one
    """

    def __init__(
        self,
        n_experts: int,
        d_model: int,
        d_expert: int,
        d_output: int,
        activation: str | None = "relu",
        gated: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        self.n_experts, self.d_model, self.d_expert, self.d_output = n_experts, d_model, d_expert, d_output
        self.activation, self.gated, self.bias = activation, gated, bias

        def bank(into: int, out: int, bias: bool = False) -> nn.ModuleList:
            return nn.ModuleList(nn.Linear(into, out, bias=bias) for _ in range(n_experts))

        self.lin1 = bank(d_model, d_expert, bias)
        self.lin2 = bank(d_expert, d_output) if activation is not None else None
        self.gate = bank(d_model, d_expert, bias) if gated else None

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = rows.split([*sizes, len(rows) - sum(sizes)])
        out = [self.expert(i, part) for i, part in enumerate(parts[:-1]) if len(part)]
        return torch.cat([*out, rows.new_zeros(len(parts[-1]), self.d_output)])

    def expert(self, i: int, x: Tensor) -> Tensor:
        h = self.lin1[i](x)
        if self.activation is None:
            return h
        act = FUNCTIONS[self.activation]
        return self.lin2[i](act(h) if self.gate is None else act(self.gate[i](x)) * h)

    def settings(self) -> dict[str, Any]:
        names = ("n_experts", "d_model", "d_expert", "d_output", "activation", "gated", "bias")
        return {name: getattr(self, name) for name in names}
