"""Depthwise convolutions of channels-last maps, (b y x d) -> (b y' x' d)."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.ops import depthwise_conv2d


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution and what surrounds it; act, residual and rectify as in `depthwise_conv2d`."""

    def __init__(
        self,
        dim: int,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = True,
        act: str | None = None,
        residual: bool = False,
        rectify: bool = False,
    ):
        super().__init__(dim, dim, kernel, stride, padding=(kernel - 1) // 2, groups=dim, bias=bias)
        self.act, self.residual, self.rectify = act, residual, rectify

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, self.act, self.stride[0], self.residual, self.rectify)

    def extra_repr(self) -> str:
        return super().extra_repr() + f", act={self.act}, residual={self.residual}, rectify={self.rectify}"


class MapConv(nn.Module):
    """A `DepthwiseConv` one level down, where some checkpoints have it."""

    def __init__(self, dim: int, **options):
        super().__init__()
        self.conv = DepthwiseConv(dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
