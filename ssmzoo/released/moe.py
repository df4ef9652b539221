"""llm-random's (Apache-2.0) layers of experts: TokenChoiceFF and ExpertChoiceFF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.feedforward.moe import MoE, build_moe
from ssmzoo.layers.feedforward.router import TokenChoice, group_by_expert
from ssmzoo.released.arguments import INITIAL, Arguments
from ssmzoo.released.names import Names, add_prefix, cut_prefix
from ssmzoo.suggest import nearest

NAMES = Names(("{at}ln.l.{p}", "{at}ln.{p}"))  # the layer norm is wrapped once more there


EQUAL = "chooses among equal implementations"
SWITCH = {"capacity_factor": 1.25, "load_balancing_loss_weight": 0.01, "zloss_weight": 0.0, "routing_top_k": 1}
CHOICE = {
    **{"topk_fraction": 1.0, "softmax_over": "tokens", "group_by_batch": False, "group_size": 1},
    "use_layer_norm": True,
}
WITHOUT = {
    **{"one_hot_impl": (False, EQUAL), "use_torch_bmm": (False, EQUAL), "use_einsum": (False, EQUAL)},
    **{"init_type": (None, INITIAL), "init_scale": (0.1, INITIAL), "detach_gate": (False, "acts in training only")},
}
OWN = {"get_router_values_from": ("weights", "the router here has weights of its own")}
ONLY = OWN | {
    "moe_values_exp": (None, "a power of the router's values exists for token choice only"),
    "random_perm": (False, "an ablation that shuffles the routers' values"),
    "softmax_ungrouped": (False, "the softmax here is taken over the group"),
}
SIZES = ("type", "dmodel", "n_experts", "expert_size")
SHARED = {"expert": "ff", "activation": "relu", "doutput": None}
TOKEN = Arguments("TokenChoiceFF", SHARED | SWITCH | {"moe_values_exp": 1}, WITHOUT, OWN, required=SIZES)
HEATMAPS = {"n_gating_heatmaps": (4, "pictures in a log")}
EXPERT = Arguments("ExpertChoiceFF", SHARED | CHOICE, WITHOUT | HEATMAPS, ONLY, required=SIZES)
TABLES = (TOKEN, EXPERT)


def official(state: dict[str, Tensor], **given):
    """llm-random's TokenChoiceFF (type "token_choice") and ExpertChoiceFF ("expert_choice").

    Outputs: y, and for token choice (y, load_balancing_loss, z_loss).
    """
    config = (EXPERT if given.get("type") == "expert_choice" else TOKEN).complete(given)
    kind, options = config.pop("type"), dict(config)
    sizes = {key: options.pop(key) for key in ("dmodel", "n_experts", "expert_size", "doutput")}
    moe = official_moe(kind, **sizes, **options)
    return _OfficialMoE(moe), add_prefix("moe.", NAMES.to_ours(state))


def official_moe(kind, dmodel, n_experts, expert_size, doutput: int | None = None, **options) -> MoE:
    """One layer of experts for llm-random's names of the options."""
    power = options.pop("moe_values_exp", None)
    moe = build_moe(dmodel, n_experts, expert_size, d_output=doutput, **official_options(kind, **options))
    if kind == "token_choice":
        moe.gating = ReleasedChoice(moe.gating, 1.0 if power is None else float(power))
    return moe


class ReleasedChoice(TokenChoice):
    """Token choice as released: a power of the probabilities counts (in the choice, the weights and the balancing
    loss), and where an expert has too many tokens, torch.topk over their 0/1 mask says which of them stay."""

    def __init__(self, plain: TokenChoice, power: float):
        super().__init__(
            plain.d_model,
            plain.n_experts,
            plain.top_k,
            plain.capacity_factor,
            plain.eval_capacity_factor,
            balance_weight=plain.balance_weight,
            z_loss_weight=plain.z_loss_weight,
        )
        self.power = power

    def forward(self, x: Tensor, mask: Tensor | None = None):
        logits = self.logits(x.flatten(0, 1))  # (t e)
        mask = None if mask is None else mask.flatten()
        p = logits.softmax(-1) ** self.power
        weight, expert = p.topk(self.top_k, dim=-1)  # (t k)
        groups = group_by_expert(expert, self.n_experts, mask=mask)
        capacity = self.capacity(p.shape[0], mask)
        if capacity is not None:
            groups = group_by_expert(self.without_overflow(expert, int(capacity)), self.n_experts, mask=mask)._replace(
                counts=groups.counts
            )
        return groups, weight.flatten()[groups.choice], self.losses(logits, p, groups, mask)

    def without_overflow(self, expert: Tensor, capacity: int) -> Tensor:
        """expert (t k) with n_experts, which is none, for choices beyond an expert's capacity."""
        chosen = nn.functional.one_hot(expert, self.n_experts).sum(1)  # (t e)
        stay = torch.zeros_like(chosen, dtype=torch.bool)
        stay.scatter_(0, chosen.topk(min(capacity, len(chosen)), dim=0).indices, True)
        return expert.masked_fill(~stay.gather(1, expert), self.n_experts)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All that has weights; a layer norm tells expert choice."""
    if "gating.gate" not in state:
        return {}
    d, experts = state["gating.gate"].shape
    inferred = {"dmodel": d, "n_experts": experts, "expert_size": state["expert_inner_function.lin1_weight"].shape[-1]}
    return inferred | ({"type": "expert_choice", "use_layer_norm": True} if "ln.l.weight" in state else {})


def official_options(
    ff_mode: str,
    expert: str,
    activation: str,
    *,
    capacity_factor: float = 1.25,
    load_balancing_loss_weight: float = 0.01,
    zloss_weight: float = 0.0,
    routing_top_k: int = 1,
    topk_fraction: float = 1.0,
    softmax_over: str = "tokens",
    group_by_batch: bool = False,
    group_size: int = 1,
    use_layer_norm: bool = True,
) -> dict:
    """llm-random's names of the options -> ours, for `build_moe`. Its capacity holds in eval mode too."""
    aliases = {"relu": ("ff", "relu"), "swi_glu": ("ff_gated", "silu"), "geglu": ("ff_gated", "gelu")}
    expert, activation = aliases.get(expert, (expert, activation))
    gated = {"relu": "reglu", "gelu": "geglu", "silu": "swiglu"}
    kinds = {"ff": activation, "ff_gated": gated.get(activation, activation), "linear": "linear"}
    if expert not in kinds:
        raise ValueError(f"unknown expert {expert!r}{nearest(expert, kinds)}; choose one of {', '.join(kinds)}")
    if ff_mode == "expert_choice":
        return dict(
            router=ff_mode,
            expert=kinds[expert],
            norm=use_layer_norm,
            fraction=topk_fraction,
            softmax_over=softmax_over,
            group_by_batch=group_by_batch,
            group_size=group_size,
        )
    return dict(
        router=ff_mode,
        expert=kinds[expert],
        top_k=routing_top_k,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
        balance_weight=load_balancing_loss_weight,
        z_loss_weight=zloss_weight,
    )


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return NAMES.to_theirs(cut_prefix("moe.", state))


class _OfficialMoE(nn.Module):
    def __init__(self, moe: MoE):
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor):
        y, aux = self.moe(x)
        losses = [aux.get(key, y.new_zeros(())) for key in ("load_balancing_loss", "z_loss")]
        return (y, *losses) if isinstance(self.moe.gating, TokenChoice) else y
