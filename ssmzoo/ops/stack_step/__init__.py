"""One token through a stack of residual layers, x <- x + mixer(RMSNorm(x)): what decoding is, as one operator.

The mixers are Mamba's and Mamba-2's. Between operators of single layers the threads part and meet again, and Python
looks after each of them; of a small model that is most of a token's time.
Letters: b batch, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ssmzoo.ops.dispatch import op
from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.quantized_linear import dequantize
from ssmzoo.ops.rms_norm import rms_norm


class Integers(NamedTuple):
    """A matrix of small integers in the place of one of floats, as in `quantized_linear` without zeros.

    activation   what becomes of what enters: float, static (8 bits by act_scale, one number) or dynamic; `token_step`'s
    rounded      (e) scales by which what comes out is rounded to 8 bits, before a bias; `token_step`'s
    """

    weight: Tensor
    scale: Tensor
    bits: int
    group_size: int
    activation: str = "float"
    act_scale: Tensor | None = None
    rounded: Tensor | None = None

    def dense(self) -> Tensor:
        return dequantize(self.weight, self.scale, None, self.bits, self.group_size)


class MambaLayer(NamedTuple):
    """The weights of `mamba_step`, behind a norm; matrices may be `Integers`, conv_weight may be (e 1 k)."""

    norm: Tensor
    eps: float
    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj: Tensor | Integers
    dt_proj: Tensor | Integers
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    in_proj: Tensor | Integers
    in_bias: Tensor | None
    out_proj: Tensor | Integers
    out_bias: Tensor | None


class Mamba2Layer(NamedTuple):
    """The weights and numbers of `mamba2_step`, behind a norm; matrices may be `Integers`, conv_weight (c 1 k)."""

    norm: Tensor
    eps: float
    in_proj: Tensor | Integers
    conv_weight: Tensor
    conv_bias: Tensor | None
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor | None
    out_proj: Tensor | Integers
    in_bias: Tensor | None
    out_bias: Tensor | None
    ngroups: int
    gate_eps: float
    dt_min: float
    dt_max: float


def layer_by_layer(x: Tensor, layers, states, norm, mamba, mamba2) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    new = []
    for layer, (conv, ssm) in zip(layers, states, strict=True):
        step = mamba if isinstance(layer, MambaLayer) else mamba2
        weights = (w.dense() if isinstance(w, Integers) else w for w in layer[2:])
        weights = (w.squeeze(1) if isinstance(w, Tensor) and w.ndim == 3 else w for w in weights)
        weights = layer._replace(**dict(zip(layer._fields[2:], weights)))
        u = norm(x, layer.norm, layer.eps).to(weights.in_proj.dtype)  # of an fp32 stream through 16-bit layers
        y, conv, ssm = step(u, conv, ssm, *weights[2:])
        x = x + y
        new.append((conv, ssm))
    return x, new


@op(parts=("rms_norm", "mamba_step", "mamba2_step"))
def stack_step(
    x: Tensor, layers: Sequence[MambaLayer | Mamba2Layer], states: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Advance layers by one token; the states given are left alone.

    x       (b d)
    layers  the weights of every layer
    states  (conv_state, ssm_state) of every layer, as `mamba_step` and `mamba2_step` take them
    returns x (b d) behind the last layer; the new states

    Source: the residual blocks of Gu & Dao 2023 (arXiv 2312.00752) and Dao & Gu 2024 (arXiv 2405.21060).
    """
    return layer_by_layer(x, layers, states, rms_norm.reference, mamba_step.reference, mamba2_step.reference)
