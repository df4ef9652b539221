"""Based: gated short convolutions, a few linear attentions and a few small windows of exact attention.

    x <- x + Mixer(RMSNorm(x));  x <- x + MLP(RMSNorm(x))      in every layer;  logits = W_head RMSNorm(x), W_head tied
    C  gated convolution    [u1, u2] = W_in x;  y = W_out (SiLU(causal depthwise conv_k(u1)) * u2)
    T  Taylor attention     weights 1 + s + s^2/2 of s = q.k / sqrt(f), normalised (ssmzoo.ops.taylor_attention)
    S  sliding attention    softmax over the last `window` keys, with rotary positions
    MLP                     W_2 (a * SiLU(g)), [a, g] = W_1 x

The state of T does not grow; its size, and with it how much can be recalled, is set by f.
The paper has no positions but in S, and windows of 64 to 128; the released models add learned positions to the
embedding (their max_position_embeddings of 0 is overruled by n_positions) and see 128 keys before a token.
Source: Arora et al. 2024 (arXiv 2402.18668); HazyResearch/based based/models (Apache-2.0) for names and initialisation.

b batch, l length, d width, h heads, f channels of a query, p = d / h, e channels of the convolution, k taps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.decoder import BackboneLM, Block, Decoder, layer_pattern, padded_vocab_size
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.mixers.short_conv import short_conv
from ssmzoo.layers.mixers.sliding_attention import SlidingAttention
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.position import document_positions, tokens_done
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, call_aligned, itemsize, left_align, refuse_prefix
from ssmzoo.ops import taylor_attention
from ssmzoo.ops.taylor_attention import n_features
from ssmzoo.ops.token_step import Register
from ssmzoo.ops.transforms import transformed


class ConvState(NamedTuple):
    conv: Tensor  # (b e k) the last k inputs of the convolution, oldest first


class TaylorState(NamedTuple):
    sums: Tensor  # (b h n p+1) fp32: phi(k) (outer) [v, 1] summed over all keys


class GatedConv(nn.Module):
    """Causal mixer (b l d) -> (b l d). expand: e / d; bias: of the two projections; the convolution has none."""

    def __init__(self, d_model: int, d_conv: int = 3, expand: float = 2, bias: bool = True):
        super().__init__()
        self.d_inner, self.d_conv = int(expand * d_model), d_conv
        if min(d_model, d_conv, self.d_inner) < 1:
            raise ValueError(f"GatedConv needs positive sizes, got {d_model=}, {d_conv=}, {expand=}")
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, bias=False)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        state: ConvState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, ConvState]:
        """`prefix` is accepted and changes nothing: the convolution is causal within a prefix as well."""
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        u, gate = self.in_proj(x).chunk(2, dim=-1)  # (b l e)
        past = None if state is None else state.conv
        u, window = short_conv(self.conv, u.transpose(1, 2), past, self.d_conv, mask, seq_idx)
        return self.out_proj(u.transpose(1, 2) * gate), ConvState(window)

    def program(self, p: Builder, x: Register) -> Register:
        u, gate = p.linear(self.in_proj, x).split(self.d_inner, self.d_inner)
        return p.linear(self.out_proj, p.mix(p.conv(self.conv, u), gate))

    def state_bytes(self, length: int) -> int:
        return self.d_inner * self.d_conv * itemsize(self)[0]


class TaylorAttention(nn.Module):
    """Causal mixer (b l d) -> (b l d). n_heads, feature_dim: h and f; eps: added to the sum of the weights."""

    def __init__(self, d_model: int, n_heads: int, feature_dim: int = 16, eps: float = 1e-12):
        super().__init__()
        if min(n_heads, feature_dim) < 1 or d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model and feature_dim be positive, got {n_heads=}, {d_model=}, "
                             f"{feature_dim=}")  # fmt: skip
        self.n_heads, self.feature_dim, self.d_head, self.eps = n_heads, feature_dim, d_model // n_heads, eps
        self.proj_q = nn.Linear(d_model, n_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(d_model, n_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: TaylorState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, TaylorState]:
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx)
        k, v = self.heads(self.proj_k(x)), self.heads(self.proj_v(x))
        sums = None if state is None else state.sums
        return self.attend(x, k, v, sums, None if mask is None else mask.mask, seq_idx)

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, sums: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, TaylorState]:
        """x (b l d) asks keys (b l h f) and values (b l h p), and what was summed before."""
        q = self.heads(self.proj_q(x))
        y, sums = taylor_attention(q, k, v, sums, mask=mask, seq_idx=seq_idx, eps=self.eps)
        return self.out_proj(y.flatten(2)), TaylorState(sums)

    def program(self, p: Builder, x: Register) -> Register:
        h, f, d = self.n_heads, self.feature_dim, self.d_head
        q, k, v = (p.linear(m, x) for m in (self.proj_q, self.proj_k, self.proj_v))
        states = (p.state(h, n_features(f), d + 1),)
        y = p.emit("taylor", p.reg(h * d), q, k, v, numbers=(h, f, d), factors=(self.eps,), states=states)
        return p.linear(self.out_proj, y)

    def heads(self, x: Tensor) -> Tensor:
        """(b l h.) -> (b l h .)"""
        return x.unflatten(-1, (self.n_heads, -1))

    def state_bytes(self, length: int) -> int:
        return self.n_heads * n_features(self.feature_dim) * (self.d_head + 1) * itemsize(self)[1]


class LearnedPositions(nn.Module):
    """A vector for every position in its document; how far that has come is carried from call to call."""

    def __init__(self, n_positions: int, d_model: int):
        super().__init__()
        self.n_positions = n_positions
        self.table = nn.Embedding(n_positions, d_model)

    def forward(
        self, input_ids: Tensor, done: Tensor | None, mask: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(b l) -> vectors (b l d), and the tokens (b) of the open document so far.

        ValueError behind the table; on a GPU, which would have to be waited for, NaN there.
        """
        padding = left_align(mask)
        seq_idx = seq_idx if padding is None else padding.align_seq_idx(seq_idx)
        position, _ = document_positions(*input_ids.shape[:2], input_ids.device, done, seq_idx)
        after = tokens_done(position, done, padding)
        if padding is not None:
            position = padding.restore(position.masked_fill(~padding.mask, 0))
        n = self.n_positions
        if not position.is_cpu:
            there = position < n
            return self.table(position.clamp(max=n - 1)).masked_fill(~there[..., None], math.nan), after
        if not torch.compiler.is_compiling() and not transformed() and int(position.max()) >= n:
            raise ValueError(
                f"the sequence reaches position {int(position.max())}, the model has learned positions for {n} tokens"
            )
        return self.table(position), after

    def state_bytes(self, length: int) -> int:
        return 8


class BasedBlock(Block):
    """A mixer and a gated MLP, under the names of the released checkpoints."""

    def __init__(self, mixer: nn.Module, d_model: int, d_ff: int, norm: Callable[[int], nn.Module]):
        nn.Module.__init__(self)
        self.norm1, self.mixer = norm(d_model), mixer
        self.norm2, self.mlp = norm(d_model), GatedMLP(d_model, d_ff, multiple_of=256)
        self.set_kinds({"mixer": mixer, "mlp": self.mlp})
        self.parallel = False

    program = Block.program

    def sublayers(self):
        return [("mixer", self.norm1, self.mixer), ("mlp", self.norm2, self.mlp)]


class BasedBackbone(Decoder):
    """The decoder under the names of the released checkpoints."""

    blocks_name, norm_name = "layers", "ln_f"


class BasedLM(BackboneLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the released 360M model.

    vocab_size, pad_vocab_size_multiple   v is vocab_size rounded up to a multiple
    d_model, n_layer, n_heads   width, number of layers, heads of T and S
    layer_pattern    one letter per layer, C, T or S; a shorter pattern repeats
    feature_dim      f: the state of T has (f+1)(f+2)/2 rows per head
    window           keys that a token of S sees, itself among them
    d_conv, conv_expand, conv_bias   of C: taps, e / d, biases of its projections
    d_ff             hidden width of the MLPs, rounded up to a multiple of 256
    eps              added to the sum of T's weights
    n_positions      rows of a table of learned positions, added to the embedding; 0: none (released models: 2048)
    norm_eps, residual_in_fp32, tie_embeddings   as in MambaLM

    Raises ValueError for sizes below 1, heads that do not fit, a window of 0 and patterns that do not fit.
    """

    decoder_name, reads_prefixes = "decode", False

    def __init__(
        self,
        vocab_size: int = 50257,
        d_model: int = 1024,
        n_layer: int = 27,
        n_heads: int = 16,
        layer_pattern: str = "CTSCCCTSCCCTSCCCTSCCCTSCCCC",
        feature_dim: int = 16,
        window: int = 129,
        d_conv: int = 3,
        conv_expand: float = 2,
        conv_bias: bool = True,
        d_ff: int = 2048,
        eps: float = 1e-12,
        n_positions: int = 2048,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
    ):
        super().__init__()
        if min(d_model, n_layer, d_ff) < 1:
            raise ValueError(f"need d_model, n_layer and d_ff of at least 1, got {d_model=}, {n_layer=}, {d_ff=}")
        norm = functools.partial(RMSNorm, eps=norm_eps)
        kinds = self.kinds(
            functools.partial(GatedConv, d_model, d_conv, conv_expand, conv_bias),
            functools.partial(TaylorAttention, d_model, n_heads, feature_dim, eps),
            functools.partial(SlidingAttention, d_model, n_heads, window),
        )
        blocks = (BasedBlock(make(), d_model, d_ff, norm) for make in letters(layer_pattern, n_layer, kinds))
        rows = padded_vocab_size(vocab_size, pad_vocab_size_multiple)
        self.backbone = BasedBackbone(nn.Embedding(rows, d_model), blocks, norm(d_model), residual_in_fp32)
        self.positions = LearnedPositions(n_positions, d_model) if n_positions else None
        self.lm_head = nn.Linear(d_model, rows, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.vocab_size = vocab_size
        self.reset_parameters()

    def kinds(self, convolution: Callable, taylor: Callable, sliding: Callable) -> dict[str, Callable]:
        """The mixers by their letters."""
        return {"C": convolution, "T": taylor, "S": sliding}

    def reset_parameters(self) -> None:
        """embeddings, projections N(0, 0.02); W_out of mixers and W_2 of MLPs N(0, 0.02 / sqrt(2 n_layer)); biases 0;
        convolutions torch's default; norms 1."""
        nn.init.normal_(self.lm_head.weight, std=0.02)
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.table.weight, std=0.02)
        for name, module in self.backbone.named_modules():
            if isinstance(module, nn.Linear):
                last = name.rpartition(".")[2] in ("out_proj", "fc2")
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(self.backbone.layers)) if last else 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def decode(self, input_ids: Tensor, state: tuple | None, **more) -> tuple[Tensor, tuple, dict[str, Tensor]]:
        """The decoder on embeddings with positions; their number so far stands before the states of the layers."""
        if not self.reads_prefixes:
            refuse_prefix(more["prefix"], type(self).__name__)
        if self.positions is None or input_ids.shape[1] == 0:
            return self.backbone(input_ids, state, **more)
        done, layers = (None, None) if state is None else (state[0], state[1:])
        vectors, done = self.positions(input_ids, done, more["mask"], more["seq_idx"])
        words = input_ids if input_ids.is_floating_point() else self.backbone.embedding(input_ids)
        hidden, state, aux = self.backbone(words + vectors, layers, **more)
        return hidden, (done, *state), aux

    def token_parts(self) -> tuple[nn.Module, nn.Module, nn.Module] | None:
        return None if self.positions is not None else (self.backbone, self.backbone.embedding, self.lm_head)


letters = layer_pattern  # the constructor has an argument of that name
