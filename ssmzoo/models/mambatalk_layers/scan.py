"""Stacks of Mamba blocks over frames: r <- r + Mamba(LN(r)), r <- r + MLP(LN(r)), LN at the end.

MLP(x) = W_2 (y * SiLU(gate)),  y, gate = W_1 x;   inner width rounded up to a multiple of 128, no biases
The transformer twin has causal attention of four heads with rotary positions in the place of Mamba, nothing else.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.mixers.attention import Attention
from ssmzoo.layers.mixers.mamba import Mamba

MIXERS = ("mamba", "attention")


class GatedMLP(nn.Module):
    def __init__(self, d_model: int, d_inner: int):
        super().__init__()
        inner = -(-d_inner // 128) * 128
        self.fc1, self.fc2 = nn.Linear(d_model, 2 * inner, bias=False), nn.Linear(inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * F.silu(gate))


class ScanBlock(nn.Module):
    """(b l d) -> (b l d); output projections start smaller by sqrt(2 x number of layers)."""

    def __init__(self, d_model: int, d_inner: int, n_layers: int, mixer: str = "mamba"):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mixer = Mamba(d_model) if mixer == "mamba" else Attention(d_model, 4)
        self.norm2, self.mlp = nn.LayerNorm(d_model), GatedMLP(d_model, d_inner)
        for last in (self.mixer.out_proj if mixer == "mamba" else self.mixer.output_projection, self.mlp.fc2):
            nn.init.kaiming_uniform_(last.weight, a=math.sqrt(5))
            last.weight.data /= math.sqrt(2 * n_layers)

    def forward(self, r: Tensor) -> Tensor:
        r = r + self.mixer(self.norm(r))[0]
        return r + self.mlp(self.norm2(r))


class Scan(nn.Module):
    """(b l d) -> (b l d_out); attention and d_out are of one kind of stack each and may be left out."""

    def __init__(
        self,
        d_model: int,
        d_inner: int,
        n_layers: int = 1,
        d_out: int | None = None,
        attention: nn.Module | None = None,
        mixer: str = "mamba",
    ):
        super().__init__()
        self.attention = attention
        self.layers = nn.ModuleList(ScanBlock(d_model, d_inner, n_layers, mixer) for _ in range(n_layers))
        self.norm_f = nn.LayerNorm(d_model)
        self.out = None if d_out is None else nn.Linear(d_model, d_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention is None else self.attention(x)
        for layer in self.layers:
            x = layer(x)
        x = self.norm_f(x)
        return x if self.out is None else self.out(x)
