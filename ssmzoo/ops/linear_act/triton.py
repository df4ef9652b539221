"""linear_act where GPU kernels are asked for by name: torch's product, cuBLAS's with its epilogue, on purpose.

A kernel of ours would save one pass over a matrix that has just been written, and lose more in the product.
"""

from ssmzoo.ops.linear_act import linear_act
from ssmzoo.ops.linear_act.torch import linear_act_torch
from ssmzoo.ops.triton import DEVICE, MISSING

linear_act.register("triton", device=DEVICE, missing=MISSING, composite=linear_act_torch)(linear_act_torch)
