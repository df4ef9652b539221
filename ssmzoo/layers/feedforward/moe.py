"""The mixture-of-experts layer: a router, a bank of experts, and the grouped dispatch between them.

    y_t = sum over the experts e that t is sent to of  weight_te FF_e(x_t)
    FF_e(x) = act(x W1_e) W2_e            gated: (act(x Wg_e) * (x W1_e)) W2_e

One layer for every system of the zoo: the router is a slot (see router.py, or any module of the same form).
b batch, l length, d width, e experts, f width of an expert, r rows that are computed.
Source: llm-random (Apache-2.0), research/conditional/moe_layers; parameter names are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.feedforward.mlp import resolve_activation
from ssmzoo.layers.feedforward.router import ExpertChoice, TokenChoice
from ssmzoo.layers.feedforward.routers import NoisyTopK, TopP
from ssmzoo.layers.init import truncated_normal_
from ssmzoo.layers.program import Builder
from ssmzoo.ops.moe_dispatch import Groups, gather_rows, grouped_matmul, scatter_rows
from ssmzoo.ops.token_step import Register
from ssmzoo.suggest import argument_names, nearest


class Experts(nn.Module):
    """A bank of equal feed-forward networks, as stacked matrices lin1_weight (e d f), lin2_weight (e f d).

    kind          relu, gelu, silu (two layers), reglu, geglu, swiglu (with gate_weight (e d f)), or linear (lin1 only)
    d_output      width of the result when it is not d; a linear expert's is f
    fan_in_experts  experts that count in the fan-in of lin2 for its initialisation; all of them by default, which makes
                  the weights sqrt(e) smaller than k would
    dropout       on the hidden units, while training
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        d_expert: int,
        kind: str = "relu",
        d_output: int | None = None,
        fan_in_experts: float | None = None,
        dropout: float = 0.0,
        init_scale: float = 0.1,
    ):
        super().__init__()
        if min(d_model, n_experts, d_expert, 1 if d_output is None else d_output) < 1:
            raise ValueError(f"Experts needs positive sizes, got {d_model=}, {n_experts=}, {d_expert=}, {d_output=}")
        if kind == "linear" and d_output not in (None, d_expert):
            raise ValueError(f"a linear expert's output is as wide as the expert, {d_expert}; got d_output={d_output}")
        self.n_experts, self.dropout, self.init_scale = n_experts, dropout, init_scale
        self.fan_in_experts = n_experts if fan_in_experts is None else fan_in_experts
        self.activation, gated = (None, False) if kind == "linear" else resolve_activation(kind)
        self.lin1_weight = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        if kind != "linear":
            self.lin2_weight = nn.Parameter(torch.empty(n_experts, d_expert, d_output or d_model))
        self.gate_weight = nn.Parameter(torch.empty(n_experts, d_model, d_expert)) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal with fan-in d (lin1, gate) and fan_in_experts * f (lin2)."""
        d, f = self.lin1_weight.shape[1:]
        truncated_normal_(self.lin1_weight, d, self.init_scale)
        if self.activation is not None:
            truncated_normal_(self.lin2_weight, self.fan_in_experts * f, self.init_scale)
        if self.gate_weight is not None:
            truncated_normal_(self.gate_weight, d, self.init_scale)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows (r d), sorted by expert; ends (e) as in `grouped_matmul` -> (r d_output)."""
        rows, lin1, lin2, gate = self._autocast(rows)
        h = grouped_matmul(rows, lin1, ends)
        if self.activation is None:
            return h
        h = self.activation(h) if gate is None else self.activation(grouped_matmul(rows, gate, ends)) * h
        return grouped_matmul(F.dropout(h, self.dropout, self.training), lin2, ends)

    def _autocast(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """Rows and weights in autocast's type: grouped_mm is not on autocast's list, so it would stay in fp32."""
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.lin1_weight.dtype
        tensors = (rows, self.lin1_weight, getattr(self, "lin2_weight", None), self.gate_weight)
        return tuple(None if t is None else t.to(dtype) for t in tensors)


class UnequalExperts(nn.Module):
    """A bank of experts of unequal widths, one `Experts` each; its forward is that of `Experts`.

    widths    of the experts | further arguments: of Experts
    """

    def __init__(self, d_model: int, widths: Sequence[int], kind: str = "relu", **experts):
        super().__init__()
        if kind == "linear":
            raise ValueError("a linear expert's output is as wide as the expert: widths must be equal, one number")
        self.n_experts = len(widths)
        fan_in = dict(fan_in_experts=len(widths)) | experts
        self.banks = nn.ModuleList(Experts(d_model, 1, width, kind, **fan_in) for width in widths)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = rows.split([*sizes, len(rows) - sum(sizes)])
        out = [bank(part, ends.new_tensor([len(part)])) for bank, part in zip(self.banks, parts)]
        return torch.cat([*out, out[0].new_zeros(len(parts[-1]), out[0].shape[1])])


class MoE(nn.Module):
    """Mixture of experts: forward(x (b l d), mask (b l) bool or None) -> (y (b l d), aux).

    router    forward(x, mask) -> (Groups, weight, aux); has `active_experts`
    experts   forward(rows, ends) -> rows
    norm      a LayerNorm on the merged output (the published expert-choice recipe)
    shared    a dense module whose output is added for every token
    aux       scalars by name: those ending in "_loss" are weighted and belong into the loss; tokens_per_expert is (e)

    Masked (padding) tokens are not routed, do not count in the losses, and get zero from the experts.
    """

    def __init__(self, router: nn.Module, experts: nn.Module, norm: bool = False, shared: nn.Module | None = None):
        super().__init__()
        if router.n_experts != experts.n_experts:
            raise ValueError(f"the router knows {router.n_experts} experts, the bank has {experts.n_experts}")
        self.gating = router
        self.expert_inner_function = experts
        self.ln = nn.LayerNorm(router.d_model) if norm else None
        self.shared = shared

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        groups, weight, aux = self.gating(x, mask)
        y = self.dispatch(x, groups, weight)
        y = y if self.ln is None else self.ln(y)
        return (y if self.shared is None else y + self.shared(x)), aux

    def dispatch(self, x: Tensor, groups: Groups, weight: Tensor) -> Tensor:
        """The weighted outputs of the chosen experts, (b l d_output)."""
        tokens = x.flatten(0, 1)  # (t d)
        rows = self.expert_inner_function(gather_rows(tokens, groups), groups.ends)
        return scatter_rows(rows, weight, groups, tokens.shape[0]).unflatten(0, x.shape[:2])

    def program(self, p: Builder, x: Register) -> Register:
        p.need(self.ln is None)
        y = p.experts(self.gating, self.expert_inner_function, x, x)
        if self.shared is not None:
            p.add(y, p.use(self.shared).program(p, x))
        return y

    def inactive_parameters(self) -> int:
        """Parameters of the experts that an average token does not use."""
        total = sum(p.numel() for p in self.expert_inner_function.parameters())
        return round(total * (1 - self.gating.active_experts / self.gating.n_experts))


class CompetitiveMoE(MoE):
    """A mixture whose experts compete now and then, and whose router (token choice) learns from the outcome.

    In a share `competition` of the training steps every token is sent to all experts; the k whose outputs have the
    largest norms win and are weighted by the softmax of these norms, and the router's probabilities are drawn towards
    the softmax over all norms by a squared error of weight `distillation_weight`. Elsewhere the router decides alone.
    Source: CompeteSMoE (arXiv 2402.02526).
    """

    def __init__(self, *args, competition: float = 0.1, distillation_weight: float = 5.0, **moe):
        super().__init__(*args, **moe)
        if not 0 <= competition <= 1 or distillation_weight < 0:
            raise ValueError(
                f"competition = {competition} is a share of the steps, in [0, 1], and distillation_weight = "
                f"{distillation_weight} must not be negative"
            )
        self.competition, self.distillation_weight = competition, distillation_weight

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.training or torch.rand(()) >= self.competition:
            y, aux = super().forward(x, mask)
            return y, aux | {"distillation_loss": torch.zeros_like(aux["router_entropy"])}
        y, error = self.compete(x, mask)
        _, _, aux = self.gating(x, mask)
        y = y if self.ln is None else self.ln(y)
        y = y if self.shared is None else y + self.shared(x)
        return y, aux | {"distillation_loss": self.distillation_weight * error}

    def compete(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs of the winners (b l d) and the mean squared error of the router."""
        tokens, e = x.flatten(0, 1), self.gating.n_experts
        t, k = len(tokens), self.gating.top_k
        ends = torch.arange(1, e + 1, device=x.device, dtype=torch.int32) * t
        every = self.expert_inner_function(tokens.repeat(e, 1), ends).unflatten(0, (e, t)).transpose(0, 1)  # (t e d)
        response = every.float().norm(dim=-1)  # (t e)
        best, winner = response.topk(k)
        won = every.gather(1, winner[..., None].expand(t, k, every.shape[-1]))  # (t k d)
        y = (best.softmax(-1)[..., None].to(won.dtype) * won).sum(1)
        real = torch.ones_like(response[:, 0]) if mask is None else mask.flatten().to(response.dtype)
        error = (self.gating.logits(tokens).softmax(-1) - response.detach().softmax(-1)).square().mean(-1)
        y = (y * real[:, None].to(y.dtype)).unflatten(0, x.shape[:2])
        return y, (real @ error.to(real.dtype)) / real.sum().clamp(min=1)


def active_parameters(model: nn.Module) -> int:
    """Parameters that an average token meets: experts and memories count by the share that one token uses."""
    total = sum(p.numel() for p in model.parameters())
    return total - sum(m.inactive_parameters() for m in model.modules() if hasattr(m, "inactive_parameters"))


def merge_aux(per_layer: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a model reports for its MoE layers: losses summed, metrics averaged, tokens_per_expert stacked (layers e).

    Adds busiest_expert, the largest share of tokens that any expert of any layer got.
    """
    merged = {}
    for key in dict.fromkeys(key for aux in per_layer for key in aux):
        values = torch.stack([aux[key] for aux in per_layer if key in aux])
        if key == "tokens_per_expert":
            merged |= {key: values, "busiest_expert": values.max()}
        else:
            merged[key] = values.sum(0) if key.endswith("_loss") else values.mean(0)
    return merged


ROUTERS = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "noisy_top_k": NoisyTopK,
    "top_p": TopP,
    "competition": TokenChoice,
}


COMPETITION = ("competition", "distillation_weight")  # options of CompetitiveMoE


def router_arguments(router: str) -> list[str]:
    """Names of the options that a router takes."""
    if router not in ROUTERS:
        known = ", ".join(ROUTERS)
        raise ValueError(f"unknown router {router!r}{nearest(str(router), ROUTERS)}; choose one of {known}")
    made_here = ("d_model", "n_experts", "init_scale", "widths")
    names = [name for name in argument_names(ROUTERS[router]) if name not in made_here]
    return names + list(COMPETITION if router == "competition" else ())


def build_moe(
    d_model: int,
    n_experts: int,
    d_expert: int | Sequence[int],
    *,
    router: str = "token_choice",
    expert: str = "relu",
    d_output: int | None = None,
    norm: bool = False,
    dropout: float = 0.0,
    init_scale: float = 0.1,
    **router_options,
) -> MoE:
    """A MoE layer from plain values.

    router          token_choice | expert_choice | noisy_top_k | top_p | competition (token choice, CompetitiveMoE)
    d_expert        width of the experts, or a list of n_experts widths
    router_options  go to the router (competition, distillation_weight to CompetitiveMoE); unknown ones raise TypeError
    """
    router_arguments(router)  # refuses an unknown router
    widths = None if isinstance(d_expert, int) else list(d_expert)
    if widths is not None:
        if len(widths) != n_experts or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(
                f"d_expert lists {len(widths)} widths {widths}; expected n_experts = {n_experts} positive ones"
            )
        if router != "expert_choice":
            router_options["widths"] = widths
    moe, compete = MoE, {}
    if router == "competition":
        moe = CompetitiveMoE
        compete = {k: router_options.pop(k) for k in COMPETITION if k in router_options}
    gating = ROUTERS[router](d_model, n_experts, init_scale=init_scale, **router_options)
    options = dict(dropout=dropout, init_scale=init_scale, d_output=d_output)
    if router == "expert_choice":
        options["fan_in_experts"] = gating.active_experts
    if widths is None:
        experts = Experts(d_model, n_experts, d_expert, expert, **options)
    else:
        experts = UnequalExperts(d_model, widths, expert, **options)
    return moe(gating, experts, norm=norm, **compete)
