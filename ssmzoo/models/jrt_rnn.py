"""JRT-RNN: Based whose linear attention reads a prefix in both directions, through keys and values of its own.

    y_i = [ sum_{j <= i} w(q_i, k_j) v_j + sum_{j < m} w(q_i, k'_j) v'_j ] / [ the same sums of weights + eps ]
    w(q, k) = 1 + s + s^2/2, s = q.k / sqrt(f);   k, v = W x,  k', v' = W' x;   m leading positions, the prefix

for every i, those within the prefix too: its tokens count twice, by design. The sums over the prefix are the state that
the recurrence begins with, so decoding costs what it costs in Based. Convolutions and windows stay causal.
Train it with task=prefix_language: next tokens behind the prefix, masked ones within it.
Source: Arora et al. 2024 (arXiv 2407.05483), section 4; HazyResearch/prefix-linear-attention based/models/mixers.

b batch, l length, d width, h heads, f channels of a query, p = d / h.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ssmzoo.layers.decoder import padded_vocab_size
from ssmzoo.layers.state import Padding, call_aligned, inside_prefix
from ssmzoo.models.based import BasedLM, TaylorAttention, TaylorState
from ssmzoo.ops import taylor_state


class PrefixLinearAttention(TaylorAttention):
    """Mixer (b l d) -> (b l d), causal but for its prefix.

    exact_mask   False: padding as published, where keys of padding are 0 before the features and so keep a weight of 1
                 with their values, and the prefix counts padding; in a first call only
    """

    def __init__(self, d_model: int, n_heads: int, feature_dim: int = 16, eps: float = 1e-12, exact_mask: bool = True):
        super().__init__(d_model, n_heads, feature_dim, eps)
        self.exact_mask = exact_mask
        self.proj_k_enc = nn.Linear(d_model, n_heads * feature_dim, bias=False)
        self.proj_v_enc = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: TaylorState | None = None,
        *,
        mask: Tensor | Padding | None = None,
        seq_idx: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, TaylorState]:
        """prefix (b): leading real positions that every position sees."""
        if isinstance(mask, Tensor):
            return call_aligned(self.forward, x, state, mask, seq_idx, prefix=prefix)
        if mask is not None and state is None and not self.exact_mask:
            y, state = self.as_published(mask.restore(x), mask, prefix)
            return mask.align(y), state
        if prefix is None:
            return super().forward(x, state, mask=mask, seq_idx=seq_idx)
        k, v = self.heads(self.proj_k(x)), self.heads(self.proj_v(x))
        sums = self.read(x, inside_prefix(prefix, x.shape[1]), None)
        return self.attend(x, k, v, sums, None if mask is None else mask.mask, seq_idx)

    program = TaylorAttention.program  # a token behind the prefix is one of Based

    def read(self, x: Tensor, inside: Tensor, keep: Tensor | None) -> Tensor:
        """The sums over the prefix, where inside (b l) is True; keep (b l): False for keys to be set to zero."""
        if inside.is_cpu and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            m = int(inside.sum(1).max())  # nothing is computed behind the longest prefix
            x, inside, keep = x[:, :m], inside[:, :m], None if keep is None else keep[:, :m]
        k, v = self.heads(self.proj_k_enc(x)), self.heads(self.proj_v_enc(x))
        return taylor_state(k if keep is None else k * keep[..., None, None], v, mask=inside)

    def as_published(self, x: Tensor, padding: Padding, prefix: Tensor | None) -> tuple[Tensor, TaylorState]:
        """x (b l d) with its padding where it was."""
        keep, l = padding.restore(padding.mask), x.shape[1]  # (b l)
        k, v = self.heads(self.proj_k(x)) * keep[..., None, None], self.heads(self.proj_v(x))
        sums = None
        if prefix is not None:
            sums = self.read(x, inside_prefix(prefix + l - padding.lengths, l), keep)
        return self.attend(x, k, v, sums, None, None)


class JRTRNNLM(BasedLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the 360M model of the paper.

    layer_pattern   letters C, P (prefix linear attention), S
    mask_row        keep a row of the vocabulary that no token has, for the mask of the masked-token loss: `mask_token`
    exact_mask      see PrefixLinearAttention
    The other arguments as in BasedLM.
    """

    reads_prefixes = True

    def __init__(
        self,
        vocab_size: int = 50257,
        d_model: int = 1024,
        n_layer: int = 26,
        n_heads: int = 16,
        layer_pattern: str = "CPSCCCPSCCCPSCCCPSCCCPSCCC",
        feature_dim: int = 16,
        window: int = 129,
        d_conv: int = 3,
        conv_expand: float = 2,
        conv_bias: bool = True,
        d_ff: int = 2048,
        n_positions: int = 2048,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
        mask_row: bool = True,
        exact_mask: bool = True,
    ):
        if "P" not in layer_pattern:
            raise ValueError(f"layer_pattern {layer_pattern!r} has no P: without prefix linear attention it is Based")
        self.exact_mask = exact_mask
        super().__init__(
            vocab_size + mask_row,
            d_model,
            n_layer,
            n_heads,
            layer_pattern,
            feature_dim,
            window,
            d_conv,
            conv_expand,
            conv_bias,
            d_ff,
            n_positions=n_positions,
            norm_eps=norm_eps,
            residual_in_fp32=residual_in_fp32,
            tie_embeddings=tie_embeddings,
            pad_vocab_size_multiple=pad_vocab_size_multiple,
        )
        self.vocab_size = vocab_size
        self.mask_token = padded_vocab_size(vocab_size + 1, pad_vocab_size_multiple) - 1 if mask_row else None

    def kinds(self, convolution: Callable, taylor: Callable, sliding: Callable) -> dict[str, Callable]:
        prefixed = functools.partial(PrefixLinearAttention, *taylor.args, exact_mask=self.exact_mask)
        return {"C": convolution, "P": prefixed, "S": sliding}
