"""depthwise_conv2d where GPU kernels are asked for by name: torch's convolution, cuDNN's, on purpose."""

from ssmzoo.ops.depthwise_conv2d import depthwise_conv2d
from ssmzoo.ops.depthwise_conv2d.torch import depthwise_conv2d_torch
from ssmzoo.ops.triton import DEVICE, MISSING

depthwise_conv2d.register("triton", device=DEVICE, missing=MISSING, composite=depthwise_conv2d_torch)(
    depthwise_conv2d_torch
)
