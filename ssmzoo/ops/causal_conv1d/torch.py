"""causal_conv1d_fn on torch's own depthwise convolution; one token at a time as the reference has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update, with_final_states, with_past
from ssmzoo.ops.checks import compute_dtype


@causal_conv1d_fn.register("torch")
def causal_conv1d_torch(a):
    """Taps that depend on the sequence index take the reference's shifted sums."""
    if a.seq_idx is not None or a.x.numel() == 0:
        return causal_conv1d_fn.reference(*a)
    dtype = compute_dtype(a.x, a.weight)
    padded = with_past(a.x, a.initial_states, a.weight.shape[1])  # (b c k-1+l)
    with torch.autocast(a.x.device.type, enabled=False):
        bias = None if a.bias is None else a.bias.to(dtype)
        y = F.conv1d(padded.to(dtype), a.weight[:, None].to(dtype), bias, groups=a.x.shape[1])
    return with_final_states((y if a.activation is None else F.silu(y)).to(a.x.dtype), a)


causal_conv1d_update.register("torch")(lambda a: causal_conv1d_update.reference(*a))  # already vectorised
