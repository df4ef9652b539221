"""Hawk: real-gated linear recurrences and gated MLPs, half of whose layers read the prefix in both directions (Birdie).

    x <- x + HawkMixer(RMSNorm(x));   x <- x + MLP(RMSNorm(x));   logits = W_head RMSNorm(x)

The mixer is a short convolution and the real-gated linear recurrent unit, beside a GeLU gate:

    side = GeLU(W_y x),   u = causal depthwise conv_k(W_x x)                            all (n)
    r = sigmoid(W_a u + b_a),   i = sigmoid(W_i u + b_i),   a = exp(-8 softplus(Lambda) r)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t),   out = W_out (side * h)

At the first token of a document the multiplier of the input is 1. Near a = 1 the derivative of the square root is
bounded, without which training diverges. The gates are dense, as in Birdie's Hawk, unlike Griffin's. A bidirectional
layer runs half of the channels backwards over the prefix (layers/mixers/two_way.py). (Griffin's text writes
a = sigmoid(Lambda)^(8 r), the same with -Lambda.) The MLP is W_2 (v * GeLU(g)), [v, g] = W_1 x, 8/3 as wide as the
model. The paper states neither vocabulary, tying nor initialisation; ours are Griffin's for the recurrence and Mamba's
for the rest.

b batch, l length, d d_model, n d_state, m channels that run forwards, k taps.
Source: De et al. 2024 (arXiv 2402.19427), section 2.4; Blouir et al. 2024 (arXiv 2411.01030); Hugging Face transformers
models/recurrent_gemma (Apache-2.0) for the parameter names and the bound.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.decoder import Block, check_sizes
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.mixers.two_way import document_starts, forward_channels, two_way
from ssmzoo.layers.norm import RMSNorm, fp32
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, is_step, itemsize
from ssmzoo.models.gated_ssm import BirdieLM, directions
from ssmzoo.ops.token_step import Register

C = 8.0  # of the decay's exponent
MAX_SLOPE = 1000.0  # of the square root
MIN_ROOT = 1 / (4 * MAX_SLOPE**2)  # below it the slope stays


class RGLRUState(NamedTuple):
    conv: Tensor  # (b n k) the last k inputs of the convolution, oldest first
    h: Tensor  # (b m) fp32
    begun: Tensor  # (b) bool, whether the document has had a token


def bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0 whose derivative is never above MAX_SLOPE, at x = 0 either."""
    if not x.requires_grad and not torch.is_grad_enabled():
        return x.clamp(min=0).sqrt()
    steep = x < MIN_ROOT
    root = torch.where(steep, MIN_ROOT, x).sqrt()
    flat = x.detach().clamp(min=0).sqrt() + MAX_SLOPE * (x - x.detach())
    return torch.where(steep, flat, root)


class RGLRU(nn.Module):
    """The gates of the recurrence: u (b l n), first (b l) bool -> decay a and input (b l n), fp32.

    Lambda starts so that a^(1/r) is uniform in [0.9, 0.999]; the gates' matrices as torch's Linear, biases 0.
    """

    def __init__(self, width: int):
        super().__init__()
        self.recurrent_gate, self.input_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.recurrent_param = nn.Parameter(torch.empty(width))  # Lambda
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.recurrent_gate.bias)
        nn.init.zeros_(self.input_gate.bias)
        with torch.no_grad():  # softplus^-1 of -ln(a) / C
            self.recurrent_param.uniform_(0.9, 0.999).log_().div_(-C).expm1_().log_()

    def forward(self, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        r, i = torch.sigmoid(fp32(self.recurrent_gate(u))), torch.sigmoid(fp32(self.input_gate(u)))
        log_a = -C * F.softplus(fp32(self.recurrent_param)) * r
        scale = bounded_sqrt(-torch.expm1(2 * log_a)).masked_fill(first[..., None], 1)
        return torch.exp(log_a), scale * i * fp32(u)


class HawkMixer(nn.Module):
    """Causal mixer (b l d) -> (b l d) that may read a prefix in both directions.

    d_conv          k
    bidirectional   half of the channels run backwards over the prefix
    conv_across_documents   let the convolution look over document boundaries, as the published code does
    """

    packed_prefix = True

    def __init__(
        self,
        d_model: int,
        d_state: int,
        d_conv: int = 4,
        bidirectional: bool = False,
        conv_across_documents: bool = False,
    ):
        super().__init__()
        if min(d_model, d_state, d_conv) < 1:
            raise ValueError(f"HawkMixer needs positive sizes, got {d_model=}, {d_state=}, {d_conv=}")
        self.d_state, self.d_conv, self.m = d_state, d_conv, forward_channels(d_state, bidirectional)
        self.conv_across_documents = conv_across_documents
        self.linear_y, self.linear_x = nn.Linear(d_model, d_state), nn.Linear(d_model, d_state)
        self.conv_1d = nn.Conv1d(d_state, d_state, d_conv, groups=d_state)
        self.rg_lru = RGLRU(d_state)
        self.linear_out = nn.Linear(d_state, d_model)

    def forward(
        self,
        x: Tensor,
        state: RGLRUState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, RGLRUState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx, prefix=prefix)
        if is_step(x, state, mask, seq_idx) and prefix is None:
            return self._step(x, state)
        past, h, begun = (None, None, None) if state is None else state
        side = F.gelu(self.linear_y(x), approximate="tanh")
        documents = None if self.conv_across_documents else seq_idx
        u = self.linear_x(x).transpose(1, 2)  # (b n l)
        u, window = short_conv(self.conv_1d, u, past, self.d_conv, mask, documents, activation=None)
        first = document_starts(False, seq_idx, x)
        if begun is not None:
            first = torch.cat([~begun[:, None], first[:, 1:]], dim=1)
        a, u = self.rg_lru(u.transpose(1, 2), first)
        h, last = two_way(a, u, h, self.m, padding=mask, seq_idx=seq_idx, prefix=prefix)
        any_token = torch.ones_like(first[:, 0]) if mask is None else mask.lengths > 0
        begun = any_token if begun is None else begun | any_token
        return self.linear_out(side * h.to(side.dtype)), RGLRUState(window, last, begun)

    def _step(self, x: Tensor, state: RGLRUState) -> tuple[Tensor, RGLRUState]:
        """One token (b 1 d), without gradients."""
        side = F.gelu(self.linear_y(x), approximate="tanh")
        u = self.linear_x(x).transpose(1, 2)  # (b n 1)
        u, window = short_conv(self.conv_1d, u, state.conv, self.d_conv, activation=None)
        a, u = self.rg_lru(u.transpose(1, 2), ~state.begun[:, None])
        h, last = two_way(a, u, state.h, self.m)
        return self.linear_out(side * h.to(side.dtype)), RGLRUState(window, last, torch.ones_like(state.begun))

    def program(self, p: Builder, x: Register) -> Register:
        side, u = p.linear(self.linear_y, x), p.linear(self.linear_x, x)
        u, lru = p.conv(self.conv_1d, u, "none"), self.rg_lru
        p.need(is_plain(lru, among=frozenset({RGLRU})))
        gates = p.linear(lru.recurrent_gate, u), p.linear(lru.input_gate, u), u
        states = p.state(self.m), p.state(dtype=torch.bool)
        more = dict(weights=(lru.recurrent_param,), numbers=(self.m,), factors=(C,), states=states)
        h = p.emit("rglru", p.reg(self.d_state), *gates, **more)
        return p.linear(self.linear_out, p.mix(side, h, act="gelu_tanh"))

    def state_bytes(self, length: int) -> int:
        size, wide = itemsize(self)
        return self.d_state * self.d_conv * size + self.m * wide + 1


class HawkLM(BirdieLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are Birdie's 1.4B model.

    vocab_size       v
    d_model, d_state, n_layer   width, channels of the recurrence, number of blocks
    d_ff             width of the MLP; None: 8/3 d_model
    d_conv           taps of the convolution before the recurrence
    layer_pattern    B reads the prefix in both directions, C is causal; a shorter pattern repeats (Birdie: BC)
    conv_across_documents   published behaviour with packed documents, where the convolution sees the one before
    tie_embeddings   the head's weight is the embedding's

    Raises ValueError for sizes below 1 and unknown letters.
    """

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 2048,
        d_state: int = 2560,
        n_layer: int = 20,
        d_ff: int | None = None,
        d_conv: int = 4,
        layer_pattern: str = "BC",
        norm_eps: float = 1e-5,
        conv_across_documents: bool = False,
        tie_embeddings: bool = True,
    ):
        d_ff = 8 * d_model // 3 if d_ff is None else d_ff
        check_sizes(vocab_size=vocab_size, d_model=d_model, d_state=d_state, n_layer=n_layer, d_ff=d_ff, d_conv=d_conv)
        pattern = directions(layer_pattern, n_layer)
        norm = functools.partial(RMSNorm, eps=norm_eps)

        def block(kind: str) -> Block:
            mixer = HawkMixer(d_model, d_state, d_conv, kind == "B", conv_across_documents)
            return Block(d_model, {"mixer": mixer, "mlp": GatedMLP(d_model, d_ff, "gelu", multiple_of=8)}, norm=norm)

        super().__init__(vocab_size, d_model, pattern, [block(kind) for kind in pattern], norm, tie_embeddings)

    def no_weight_decay(self) -> list[str]:
        """The parameters of the RG-LRUs, as published."""
        return [name for name, _ in self.named_parameters() if ".rg_lru." in name]
