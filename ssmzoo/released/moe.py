"""llm-random's (Apache-2.0) layers of experts: TokenChoiceFF and ExpertChoiceFF."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.layers.feedforward.moe import MoE, build_moe
from ssmzoo.layers.feedforward.router import TokenChoice
from ssmzoo.released.names import Names, add_prefix, cut_prefix
from ssmzoo.suggest import nearest

NAMES = Names(("{at}ln.l.{p}", "{at}ln.{p}"))  # the layer norm is wrapped once more there


def official(
    state: dict[str, Tensor],
    *,
    type: str,
    dmodel: int,
    n_experts: int,
    expert_size: int,
    expert: str = "ff",
    activation: str = "relu",
    doutput: int | None = None,
    capacity_factor: float = 1.25,
    load_balancing_loss_weight: float = 0.01,
    zloss_weight: float = 0.0,
    routing_top_k: int = 1,
    topk_fraction: float = 1.0,
    softmax_over: str = "tokens",
    group_by_batch: bool = False,
    group_size: int = 1,
    use_layer_norm: bool = True,
    one_hot_impl: bool = False,
    use_torch_bmm: bool = False,
    use_einsum: bool = False,
    init_type: str | None = None,
    init_scale: float = 0.1,
):
    """llm-random's TokenChoiceFF ("token_choice") and ExpertChoiceFF ("expert_choice").

    one_hot_impl, use_torch_bmm and use_einsum choose among equal implementations, init_type and init_scale an
    initialisation that the checkpoint overwrites. Outputs: y, and for token choice (y, load_balancing_loss, z_loss).
    """
    options = dict(
        topk_fraction=topk_fraction,
        softmax_over=softmax_over,
        group_by_batch=group_by_batch,
        group_size=group_size,
        use_layer_norm=use_layer_norm,
    )
    if type == "token_choice":
        options = dict(
            capacity_factor=capacity_factor,
            load_balancing_loss_weight=load_balancing_loss_weight,
            zloss_weight=zloss_weight,
            routing_top_k=routing_top_k,
        )
    options = official_options(type, expert, activation, **options)
    moe = build_moe(dmodel, n_experts, expert_size, d_output=doutput, **options)
    return _OfficialMoE(moe), add_prefix("moe.", NAMES.to_ours(state))


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
