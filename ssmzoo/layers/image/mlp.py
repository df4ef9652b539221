"""The feed-forward halves of vision blocks, with the parameter names of their checkpoints; (... d) -> (... d)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.image.fused import fused_linear

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def activation(name: str) -> nn.Module:
    """A new module for 'silu', 'gelu' (exact), 'relu' or 'sigmoid'."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class Mlp(nn.Module):
    """W2 act(W1 x)"""

    def __init__(self, dim: int, hidden: int, act: str = "gelu", drop: float = 0.0):
        super().__init__()
        activation(act)  # refuses an unknown name
        self.fc1, self.fc2, self.act = nn.Linear(dim, hidden), nn.Linear(hidden, dim), act
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(fused_linear(self.fc1, x, self.act))
        return self.drop(fused_linear(self.fc2, x))

    def extra_repr(self) -> str:
        return f"act={self.act}"


class GatedMlp(nn.Module):
    """W2 (u act(g)), [u, g] = W1 x"""

    def __init__(self, dim: int, hidden: int, act: str = "gelu", drop: float = 0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * hidden), activation(act), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(u * self.act(g))))


def make_mlp(dim: int, hidden: int, act: str = "gelu", gated: bool = False, drop: float = 0.0) -> nn.Module:
    """`GatedMlp` or `Mlp`."""
    return (GatedMlp if gated else Mlp)(dim, hidden, act, drop)


class SwiGLU(nn.Module):
    """W3 (SiLU(W1 x) * W2 x)"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
