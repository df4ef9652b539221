"""quantized_linear by torch's functions: the matrix is written out in x's dtype, then multiplied.

For 16/32-bit activations this reads the small integers, but writes and reads a matrix of the full size as well: it is
correct everywhere and fast for many tokens at once, and does not pay for one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.checks import compute_dtype
from ssmzoo.ops.quantized_linear import dequantize, quantized_linear, seen


@quantized_linear.register("torch")
def quantized_linear_torch(a) -> Tensor:
    dtype = compute_dtype(a.x, a.scale)
    zero = None if a.zero is None else a.zero.to(dtype)
    W = dequantize(a.weight, a.scale.to(dtype), zero, a.bits, a.group_size)
    x, bias = a.x.to(dtype), None if a.bias is None else a.bias.to(dtype)
    with torch.autocast(a.x.device.type, enabled=False):
        return F.linear(seen(x, a.act_scale), W, bias).to(a.x.dtype)
