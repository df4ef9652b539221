"""Convolutions over frames, as MambaTalk's two stages share them: one latent vector per frame.

    encoder   n times [conv 3 -> w, LeakyReLU 0.2, x + conv 3(LeakyReLU 0.2(conv 3(x)))]

Source: project MambaTalk @b3c30e4 (Apache-2.0), models/motion_encoder.py; parameter names are theirs.
"""

from __future__ import annotations

from torch import Tensor, nn

SLOPE = 0.2


def conv(c_in: int, c_out: int) -> nn.Conv1d:
    """Kernel 3 with Xavier normal weights and no bias at first."""
    made = nn.Conv1d(c_in, c_out, 3, padding=1)
    nn.init.xavier_normal_(made.weight)
    nn.init.zeros_(made.bias)
    return made


class ResBlock(nn.Module):
    """(b w l) -> (b w l)."""

    def __init__(self, width: int):
        super().__init__()
        self.model = nn.Sequential(conv(width, width), nn.LeakyReLU(SLOPE), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.model(x)


class MotionEncoder(nn.Module):
    """(b l c) -> (b l width), n_layers times a convolution and a residual block."""

    def __init__(self, channels: int, width: int, n_layers: int):
        super().__init__()
        blocks = []
        for i in range(n_layers):
            blocks += [conv(width if i else channels, width), nn.LeakyReLU(SLOPE), ResBlock(width)]
        self.main = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x.mT).mT
