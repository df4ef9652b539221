"""The short causal convolution in front of a mixer, with the inputs that it remembers from call to call."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.state import Padding, conv_window
from ssmzoo.ops import causal_conv1d_fn, causal_conv1d_update


def short_conv(
    conv: nn.Module,
    x: Tensor,
    past: Tensor | None,
    width: int,
    padding: Padding | None = None,
    seq_idx: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """x (b c l) and the window before it (b c width), None for zeros -> y (b c l), the window after it.

    conv   a depthwise nn.Conv1d of `width` taps without padding, or what replaces it; a method `activate` of the latter
           stands in for SiLU
    """
    one = x.shape[2] == 1 and past is not None and padding is None and seq_idx is None
    if one and not torch.is_grad_enabled() and is_plain(conv):
        window = past.to(x.dtype, copy=True)  # the caller keeps the state it passed in
        y = causal_conv1d_update(x[..., 0], window, conv.weight.squeeze(1), conv.bias, activation=activation)
        return y[..., None], window
    window = conv_window(x, past, width, padding, seq_idx)
    history = None if past is None or width == 1 else past[..., 1 - width :]  # (b c width-1)
    if is_plain(conv):
        weight, bias = conv.weight.squeeze(1), conv.bias
        y = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, initial_states=history, activation=activation)
        return y, window
    before = x.new_zeros(*x.shape[:2], width - 1) if history is None else history.to(x.dtype)
    x = torch.cat([before, x], dim=-1)
    y = conv(x) if seq_idx is None else _by_windows(conv, x, width, seq_idx)
    activate = getattr(conv, "activate", F.silu) if activation == "silu" else None  # its own may round behind
    return (y if activate is None else activate(y)), window


def _by_windows(conv: nn.Module, x: Tensor, width: int, seq_idx: Tensor) -> Tensor:
    """Every output from a window of its own in which other documents are zero. x (b c width-1+l) -> (b c l)"""
    number = torch.cat([seq_idx[:, :1].expand(-1, width - 1), seq_idx], dim=1)
    same = number.unfold(1, width, 1) == seq_idx[..., None]  # (b l width)
    windows = x.unfold(2, width, 1).transpose(1, 2) * same[:, :, None]  # (b l c width)
    y = conv(windows.flatten(0, 1)).squeeze(-1).unflatten(0, seq_idx.shape).transpose(1, 2)
    return y * (seq_idx >= 0)[:, None]  # negative numbers are padding, as in `causal_conv1d_fn`
