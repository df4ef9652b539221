"""The feed-forward halves of vision blocks, with the parameter names of their checkpoints; (... d) -> (... d)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.ops import linear_act

ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def activation(name: str) -> nn.Module:
    """A new module for 'silu', 'gelu' (exact), 'relu' or 'sigmoid'."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class Linear(nn.Linear):
    """torch's linear layer with the activation `act` (None, "gelu", "relu", "silu") behind it, fused where possible."""

    def __init__(self, dim: int, out_dim: int, bias: bool = True, act: str | None = None):
        super().__init__(dim, out_dim, bias)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return linear_act(x, self.weight, self.bias, self.act)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", act={self.act}" if self.act else "")


class Mlp(nn.Module):
    """W2 act(W1 x)"""

    def __init__(self, dim: int, hidden: int, act: str = "gelu", drop: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden, act=act), Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.fc1(x))))


class GatedMlp(nn.Module):
    """W2 (u act(g)), [u, g] = W1 x"""

    def __init__(self, dim: int, hidden: int, act: str = "gelu", drop: float = 0.0):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * hidden), activation(act), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.fc1(x).chunk(2, dim=-1)
        return self.drop(self.fc2(self.drop(u * self.act(g))))


class SwiGLU(nn.Module):
    """W3 (SiLU(W1 x) * W2 x)"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))
