"""Window attention with a learned relative position bias (Swin), as MambaIRv2 and its window-attention twin use it.

The projection to q, k, v is the caller's: it is computed on all tokens before they are cut into windows.
Letters: b batch, y x rows and columns, w window side, m = number of windows, h heads, p width of a head, c = h p.
Source: Liu et al., Swin Transformer, arXiv 2103.14030.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from ssmzoo.ops.eager import eager
from ssmzoo.ops.transforms import scaled_dot_product_attention

MASKED = -100.0  # added to the logits of pairs from different regions, as in the released models


def to_windows(x: Tensor, w: int) -> Tensor:
    """(b y x c) to (b*m w*w c); y and x must be multiples of w."""
    b, height, width, c = x.shape
    x = x.view(b, height // w, w, width // w, w, c).transpose(2, 3)
    return x.reshape(-1, w * w, c)


def from_windows(x: Tensor, w: int, height: int, width: int) -> Tensor:
    """(b*m w*w c) back to (b y x c)."""
    x = x.view(-1, height // w, width // w, w, w, x.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], height, width, x.shape[-1])


def relative_position_index(w: int) -> Tensor:
    """(w*w w*w) int64: row of the bias table for a (query, key) pair, (dy + w-1)(2w-1) + dx + w-1."""
    at = torch.stack(torch.meshgrid(torch.arange(w), torch.arange(w), indexing="ij")).flatten(1)  # (2 w*w)
    dy, dx = at[:, :, None] - at[:, None, :] + w - 1
    return dy * (2 * w - 1) + dx


@functools.lru_cache(maxsize=32)
def _shift_mask(height: int, width: int, w: int, shift: int, device: torch.device) -> Tensor:
    def band(n):  # region label along one axis after rolling by -shift
        at = torch.arange(n, device=device)
        return (at >= n - w).long() + (at >= n - shift).long()

    label = 3 * band(height)[:, None] + band(width)[None, :]
    label = to_windows(label[None, :, :, None], w).squeeze(-1)  # (m w*w)
    return (label[:, None, :] != label[:, :, None]) * MASKED


def shift_mask(height: int, width: int, w: int, shift: int, device: torch.device) -> Tensor:
    """(m w*w w*w) float: 0 inside a region of the rolled map, -100 between regions that are no neighbours."""
    if not eager():  # what a trace makes must not be kept
        return _shift_mask.__wrapped__(height, width, w, shift, device)
    with torch.inference_mode(False), torch.no_grad():  # the cached tensor may be used for training later
        return _shift_mask(height, width, w, shift, device)


class WindowAttention(nn.Module):
    """softmax(q k^T / sqrt(p) + bias[relative position] + mask) v inside windows, then a projection.

    qkv      (b*m w*w 3c)    channels ordered (q, k, v), then head, then width of the head
    mask     (m w*w w*w)     added to the logits, or None
    returns  (b*m w*w c)
    """

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"embed_dim = {dim} is not divisible by num_heads = {num_heads}")
        self.num_heads, self.window_size = num_heads, window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("index", relative_position_index(window_size), persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias(self, mask: Tensor | None) -> Tensor:
        """(1 h n n), or (m h n n) with a mask; n = w*w."""
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]
        return bias if mask is None else bias + mask[:, None].to(bias.dtype)

    def forward(self, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
        windows, n, _ = qkv.shape
        q, k, v = qkv.view(windows, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (b*m h n p)
        bias = self.bias(mask).to(q.dtype)
        out = attend(q, k, v, bias)
        return self.proj(out.transpose(1, 2).reshape(windows, n, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(p) + bias) v; q, k, v (b*m h n p), bias (m h n n) or (1 h n n).

    No fused kernel of torch gives the bias a gradient on a CPU, and what its attention composes in place of one takes
    1.3 to 1.8 times as long as these lines: it also looks for rows without any key, which windows do not have.
    """
    m = bias.shape[0]
    if bias.requires_grad and bias.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        scores = (scores.unflatten(0, (-1, m)) + bias).flatten(0, 1)
        return scores.softmax(dim=-1) @ v
    return scaled_dot_product_attention(q, k, v, attn_mask=bias if m == 1 else bias.repeat(len(q) // m, 1, 1, 1))


def shifted_window_attention(qkv: Tensor, attention: WindowAttention, shift: int) -> Tensor:
    """(b y x 3c) to (b y x c): roll by -shift, attend inside windows, roll back (shift = 0: no roll)."""
    _, height, width, _ = qkv.shape
    w = attention.window_size
    mask = None
    if shift:
        qkv = qkv.roll((-shift, -shift), dims=(1, 2))
        mask = shift_mask(height, width, w, shift, qkv.device)
    out = from_windows(attention(to_windows(qkv, w), mask), w, height, width)
    return out.roll((shift, shift), dims=(1, 2)) if shift else out
