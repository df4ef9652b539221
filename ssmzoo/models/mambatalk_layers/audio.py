"""Sound to one vector per frame: residual convolutions of kernel 15 with three scales, 540 samples per frame.

block(i, o, s, p)   x -> LeakyReLU(BN(conv 15(LeakyReLU(BN(conv 15, stride s, padding p (x))))) + shortcut(x))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AudioBlock(nn.Module):
    """(b i t) -> (b o t'); the shortcut is a strided convolution and BatchNorm where the stride is not 1."""

    def __init__(self, c_in: int, c_out: int, stride: int, padding: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(c_in, c_out, 15, stride, padding), nn.BatchNorm1d(c_out)
        self.conv2, self.bn2 = nn.Conv1d(c_out, c_out, 15, padding=7), nn.BatchNorm1d(c_out)
        shortcut = [nn.Conv1d(c_in, c_out, 15, stride, padding), nn.BatchNorm1d(c_out)]
        self.downsample = nn.Sequential(*shortcut) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.leaky_relu(self.bn1(self.conv1(x)))))
        return F.leaky_relu(y + self.downsample(x))


class AudioEncoder(nn.Module):
    """samples (b t c) -> (b frames a) of `frames` frames: cut at the end, or the last ones repeated."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        a4, a2, a = width // 4, width // 2, width
        self.feat_extractor = nn.Sequential(
            AudioBlock(channels, a4, 5, 1600),
            AudioBlock(a4, a4, 6, 0),
            AudioBlock(a4, a4, 1, 7),
            AudioBlock(a4, a2, 6, 0),
            AudioBlock(a2, a2, 1, 7),
            AudioBlock(a2, a, 3, 0),
        )
        sides = [
            nn.Sequential(AudioBlock(a4, a2, 6, 0), AudioBlock(a2, a, 3, 0)),
            nn.Sequential(AudioBlock(a2, a, 3, 0)),
        ]
        self.multi_scale = nn.ModuleList(sides)
        self.out = nn.Linear(3 * a, a)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = self.feat_extractor[:3](x.mT)
        y = self.feat_extractor[3:5](x)
        scales = [self.multi_scale[0](x), self.multi_scale[1](y), self.feat_extractor[5](y)]
        return to_frames(self.out(torch.cat(scales, 1).mT), frames)


def to_frames(x: Tensor, frames: int) -> Tensor:
    """(b t a) -> (b frames a)."""
    lacking = frames - x.shape[1]
    if lacking > x.shape[1]:
        raise ValueError(f"the sound gives {x.shape[1]} frames and the motion has {frames}: give as much of both")
    return torch.cat([x, x[:, -lacking:]], 1) if lacking > 0 else x[:, :frames]
