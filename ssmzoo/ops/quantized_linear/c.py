"""quantized_linear on our compiled CPU kernel (native/matrix.c): every weight is read once, as it is stored.

16/32-bit activations are rounded to 16 bits with a scale per 256 inputs or fewer, which costs 2^-16 of the largest of
them; 8-bit ones are exact. Products and their sums over a group are integers. Many tokens at once meet floats.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.eager import needs_grad, why_not_eager
from ssmzoo.ops.native.multiply import DYNAMIC, FLOAT, MISSING, STATIC, dense, multiply, packed
from ssmzoo.ops.quantized_linear import quantized_linear, seen

MANY = 64  # tokens: from here on the matrix is written out as floats, which costs less than what MKL's product gains


def why_not(a) -> str | None:
    tensors = a.x, a.scale, a.zero, a.bias
    if needs_grad(*tensors):
        return "serves without gradients"
    if a.bits == 4 and a.group_size % 2 and a.scale.shape[1] > 1:
        return f"reads 4-bit weights in pairs of one group; group_size = {a.group_size} is odd"
    for t in a[1:5]:
        if t is not None and not t.is_contiguous():
            return f"computes with contiguous tensors, got strides {t.stride()}"
    return why_not_eager(*tensors)


@quantized_linear.register("c", device="cpu", missing=MISSING, unsupported=why_not)
def quantized_linear_c(a) -> Tensor:
    matrix = packed(a.weight, a.bias, a.scale, a.zero, a.bits, a.group_size)
    if a.x.numel() > MANY * a.x.shape[-1]:
        return F.linear(seen(a.x, a.act_scale), dense(matrix), a.bias)
    if a.act_scale is None:
        return multiply(a.x.contiguous(), matrix, FLOAT)
    if isinstance(a.act_scale, str):
        return multiply(a.x.contiguous(), matrix, DYNAMIC)
    return multiply(a.x.contiguous(), matrix, STATIC, float(a.act_scale))
