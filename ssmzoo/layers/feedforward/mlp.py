"""Dense feed-forward layers, and the activations that they and the experts know by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.init import truncated_normal_
from ssmzoo.ops.token_step import Register
from ssmzoo.suggest import nearest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": Tensor.sigmoid,
}
GATED = {"reglu": "relu", "geglu": "gelu", "swiglu": "silu"}  # act(x W_gate) * (x W_1)


def resolve_activation(name: str) -> tuple[Callable[[Tensor], Tensor], bool]:
    """Name -> (activation, whether it acts on a separate gate). Raises ValueError with the nearest names."""
    if name in GATED:
        return ACTIVATIONS[GATED[name]], True
    if name not in ACTIVATIONS:
        known = [*ACTIVATIONS, *GATED]
        raise ValueError(f"unknown activation {name!r}{nearest(str(name), known)}; choose one of {', '.join(known)}")
    return ACTIVATIONS[name], False


class FeedForward(nn.Module):
    """W_2 act(W_1 x), x (... d) -> (... d); both matrices truncated normal (`truncated_normal_`), biases zero.

    activation  relu, gelu or silu
    Raises ValueError for a gated or unknown activation and for sizes below 1.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", bias: bool = False, init_scale: float = 0.1):
        super().__init__()
        if min(d_model, d_ff) < 1:
            raise ValueError(f"FeedForward needs positive sizes, got d_model={d_model}, d_ff={d_ff}")
        self.activation, gated = resolve_activation(activation)
        if gated:
            raise ValueError(f"FeedForward has no gate, so activation {activation!r} does not fit; use GatedMLP")
        self.init_scale = init_scale
        self.fc1 = nn.Linear(d_model, d_ff, bias=bias)
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.fc1, self.fc2):
            truncated_normal_(linear.weight, linear.in_features, self.init_scale)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))

    def program(self, p: Any, x: Register) -> Register:
        return p.linear(self.fc2, p.linear(self.fc1, x, p.act(self.activation)))


class GatedMLP(nn.Module):
    """W_2 (a * act(g)) with [a, g] = W_1 x: the first half is the value, the second the gate; x (... d) -> (... d).

    d_ff         width of a and of g, rounded up to a multiple of `multiple_of`
    activation   act: silu (SwiGLU), gelu or relu
    Initialisation is torch's for a Linear. Names and layout are those of state-spaces/mamba's modules/mlp.py.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "silu", bias: bool = False, multiple_of: int = 128):
        super().__init__()
        if min(d_model, d_ff, multiple_of) < 1:
            raise ValueError(f"GatedMLP needs positive sizes, got d_model={d_model}, d_ff={d_ff}, {multiple_of=}")
        d_ff = -(-d_ff // multiple_of) * multiple_of
        self.activation, gated = resolve_activation(activation)
        if gated:
            raise ValueError(f"GatedMLP gates by itself: activation must be relu, gelu or silu, got {activation!r}")
        self.fc1 = nn.Linear(d_model, 2 * d_ff, bias=bias)
        self.fc2 = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * self.activation(gate))

    def program(self, p: Any, x: Register) -> Register:
        value, gate = p.linear(self.fc1, x).split(self.fc2.in_features, self.fc2.in_features)
        return p.linear(self.fc2, p.mix(gate, value, act=p.act(self.activation)))
