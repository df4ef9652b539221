"""Mamba-FSCIL as released: MambaNeck."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.models.mamba_fscil import MambaNeck

MODELS = (MambaNeck,)
TELLING_KEYS = r"etf_vec|block_new\.|mlp_proj\."
LOSS_WEIGHTS = {
    "loss_weight_supp": "weight_supp",
    "loss_weight_supp_novel": "weight_supp_novel",
    "loss_weight_sep": "weight_sep",
    "loss_weight_sep_new": "weight_sep_new",
}


def official(state: dict[str, Tensor], **official_kwargs):
    """MambaNeck."""
    return TupleNeck(**neck_arguments(**official_kwargs)[0]), state


def neck_arguments(version: str = "ssm", ssm_expand_ratio: float = 1, param_avg_dim: str = "0-1-3", **kwargs):
    """(arguments of `MambaNeck`, arguments of `incremental_losses`) for the released neck's."""
    if ssm_expand_ratio != 1:
        raise ValueError(f"ssm_expand_ratio={ssm_expand_ratio}: without an output projection only 1 fits")
    losses = {ours: kwargs.pop(theirs) for theirs, ours in LOSS_WEIGHTS.items() if theirs in kwargs}
    return kwargs | {"version": version}, losses | {"average": tuple(int(d) for d in param_avg_dim.split("-"))}


class TupleNeck(MambaNeck):
    """The neck with the released output: a plain tuple, without the new branch's entries if there is none."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for value in super().forward(x) if value is not None)
