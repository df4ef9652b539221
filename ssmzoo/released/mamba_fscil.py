"""Mamba-FSCIL as released: MambaNeck."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.models.mamba_fscil import MambaNeck
from ssmzoo.released.arguments import Arguments

MODELS = (MambaNeck,)
TELLING_KEYS = r"etf_vec|block_new\.|mlp_proj\."
LOSS_WEIGHTS = {
    "loss_weight_supp": "weight_supp",
    "loss_weight_supp_novel": "weight_supp_novel",
    "loss_weight_sep": "weight_sep",
    "loss_weight_sep_new": "weight_sep_new",
}
NECK = Arguments(
    "MambaNeck",
    {
        **{"in_channels": 512, "out_channels": 512, "mid_channels": None, "version": "ssm", "feat_size": 2},
        **{"use_residual_proj": False, "d_state": 256, "d_rank": None, "num_layers": 2, "num_layers_new": None},
        **{"use_new_branch": False, "detach_residual": False, "param_avg_dim": "0-1-3"},
        **dict.fromkeys(LOSS_WEIGHTS, 0.0),  # of the losses, which the training step computes
    },
    {},
    {"ssm_expand_ratio": (1, "without an output projection only 1 fits")},
)
TABLES = (NECK,)


def official(state: dict[str, Tensor], **official_kwargs):
    """MambaNeck."""
    return TupleNeck(**neck_arguments(**official_kwargs)[0]), state


def neck_arguments(**given):
    """(arguments of `MambaNeck`, arguments of `incremental_losses`) for the released neck's."""
    config = NECK.complete(given)
    losses: dict[str, Any] = {ours: config.pop(theirs) for theirs, ours in LOSS_WEIGHTS.items()}
    losses["average"] = tuple(int(d) for d in config.pop("param_avg_dim").split("-"))
    return config, losses


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes; what the losses weigh has no weights."""
    if "mlp_proj.0.weight" not in state:
        return {}
    two_sided = "block.x_proj_weight" in state
    rank = "block.dt_projs_weight" if two_sided else "block.dt_proj.weight"
    inferred = {
        **{"version": "ss2d" if two_sided else "ssm", "use_residual_proj": "residual_proj.proj.weight" in state},
        **{"in_channels": state["mlp_proj.0.weight"].shape[1], "out_channels": state["pos_embed"].shape[-1]},
        **{"mid_channels": len(state["mlp_proj.0.weight"]), "feat_size": state["mlp_proj.1.weight"].shape[-1]},
        **{"d_state": state["block.A_logs" if two_sided else "block.A_log"].shape[-1]},
        **{"d_rank": state[rank].shape[-1], "use_new_branch": "pos_embed_new" in state},
        **{"num_layers": 3 if "mlp_proj.6.weight" in state else 2},
    }
    if inferred["use_new_branch"]:
        inferred["num_layers_new"] = 3 if "mlp_proj_new.6.weight" in state else 2
    return inferred


class TupleNeck(MambaNeck):
    """The neck with the released output: a plain tuple, without the new branch's entries if there is none."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(value for value in super().forward(x) if value is not None)
