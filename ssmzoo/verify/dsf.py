"""The layers of the dynamical-systems framework as released: MHA, MHNA, S6, S6_2 and qLSTM. Our names are theirs."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.probes.dsf_layers import QLSTM, S6, LinearAttention, NormalizedAttention, ScalarS6, SoftmaxAttention


def official(
    state: dict[str, Tensor],
    *,
    d_model: int,
    d_qk: int | None = None,
    num_heads: int = 1,
    lin_att: bool = False,
    bias: bool | None = None,
    dropout: float = 0.0,
    layer_idx: int | None = None,
    d_state: int = 16,
    expand: float = 1,
    dt_rank: int | str = "auto",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
    use_fast_path: bool = True,
    expansion_factor: int = 2,
    kernel_size: int = 4,
    reversed: bool = False,
):
    """MHA, MHNA, S6, S6_2, qLSTM, by their keys. layer_idx and use_fast_path choose caches and kernels."""
    del layer_idx, use_fast_path
    if "gates.weight" in state:
        return QLSTM(d_model, expansion_factor, kernel_size, reversed), state
    if "Wqk.weight" in state:
        layer = NormalizedAttention if "Wn.weight" in state else LinearAttention if lin_att else SoftmaxAttention
        return layer(d_model, d_qk, num_heads, True if bias is None else bias, dropout), state
    if expand != 1:
        raise ValueError(f"expand is {expand}; these layers have no input projection, so only 1 fits")
    steps = dict(dt_min=dt_min, dt_max=dt_max, dt_init=dt_init, dt_scale=dt_scale, dt_init_floor=dt_init_floor)
    if "Id" in state:
        return ScalarS6(d_model, d_state, **steps, bias=bool(bias)), state
    return S6(d_model, d_state, dt_rank, **steps, bias=bool(bias)), state
