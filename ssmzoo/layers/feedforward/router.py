"""Routers: who sends which token to which expert, and what it costs to do so unevenly.

    s = x W_g,  p = softmax_experts(s)                     always in fp32 (or fp64)
    token choice    a token takes its k experts of largest p; output weight p_e (Switch: k = 1)
    expert choice   an expert takes its tokens of largest p; a token may get 0 .. E experts

A router is `forward(x (b l d), mask (b l) or None) -> (Groups, weight (r), aux)`; `aux` are scalars, those ending in
"_loss" already weighted. b batch, l length, t = b l tokens, d width, e experts, k choices, r rows that are computed.
Source: Switch (2101.03961), expert choice (2202.09368), ST-MoE (2202.08906); llm-random (Apache-2.0),
research/conditional/moe_layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssmzoo.layers.init import truncated_normal_
from ssmzoo.ops.moe_dispatch import Groups, group_by_expert, router_logits
from ssmzoo.suggest import nearest


@dataclass
class Window:
    """Micro-batches whose gradients add up to one update: their router's losses and capacities are those of the whole.

    tokens   real tokens of this process in the window, for the capacity;  micro_batches  how many there are
    index    the micro-batch that is computed now;  counting  True during the first pass, without gradient, which fills
    counts   the choices (e) per expert of every micro-batch, and then
    chosen   the choices (e) of the window over all processes, and total, the number of its tokens
    """

    tokens: int
    micro_batches: int
    index: int = 0
    counting: bool = True
    counts: list[Tensor] = field(default_factory=list)
    chosen: Tensor | None = None
    total: Tensor | None = None

    def close(self) -> None:
        """End the first pass: from here on the whole window is known."""
        counts = torch.stack(self.counts).sum(0).double()
        totals = torch.cat([counts, counts.new_tensor([self.tokens])])
        if _distributed():
            dist.all_reduce(totals)
        self.total = totals[-1].clamp(min=1)
        self.chosen, self.counting = totals[:-1], False


class Router(nn.Module):
    """The linear router s = x W_g with W_g (d e), truncated normal with fan-in d; gate_bias (e) is added where a model
    that was rewritten needs one (`ssmzoo.adapt.quantise`), and is None otherwise."""

    def __init__(self, d_model: int, n_experts: int, jitter: float = 0.0, init_scale: float = 0.1):
        super().__init__()
        if min(d_model, n_experts) < 1:
            raise ValueError(f"a router needs positive sizes, got d_model={d_model}, n_experts={n_experts}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {jitter}")
        self.d_model, self.n_experts, self.jitter, self.init_scale = d_model, n_experts, jitter, init_scale
        self.gate = nn.Parameter(torch.empty(d_model, n_experts))
        self.register_parameter("gate_bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        truncated_normal_(self.gate, self.d_model, self.init_scale)

    def logits(self, x: Tensor) -> Tensor:
        """x (... d) -> s (... e), fp32 or fp64"""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.jitter and self.training:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        s = router_logits(x, self.gate)
        return s if self.gate_bias is None else s + self.gate_bias


class TokenChoice(Router):
    """Every token takes its `top_k` experts of largest probability.

    capacity_factor       while training an expert computes at most max(1, floor(cf t k / e)) choices, the first ones in
                          flattened (batch, time) order; the others contribute zero. t counts this process's real
                          tokens. None: nothing is dropped
    eval_capacity_factor  the same in eval mode; None keeps outputs independent of batch mates and of chunking
    renormalise           divide the k probabilities by their sum, which is the softmax over the k chosen logits
    jitter                training only: the router reads x * U(1 - jitter, 1 + jitter)
    balance_weight        alpha of  alpha e sum_i f_i P_i:  f_i = share of tokens that chose i, counted before dropping
                          and without gradient, P_i = mean probability; over the batches of all processes
    z_loss_weight         w of  w mean_t logsumexp(s_t)^2
    penalty_weight        w of  w e sum_i f_i (h_i / mean h) P_i:  the balance loss for experts of unequal widths h
                          (`widths`), in which wide ones cost more

    While training in several processes both losses are over the tokens of all of them. `window`, set by whoever adds up
    the gradients of several micro-batches, widens losses and capacity to all of these.
    """

    window: Window | None = None

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int = 1,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        renormalise: bool = False,
        jitter: float = 0.0,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        init_scale: float = 0.1,
        penalty_weight: float = 0.0,
        widths: Sequence[int] | None = None,
    ):
        super().__init__(d_model, n_experts, jitter, init_scale)
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k is {top_k}, but a token can choose 1 to n_experts = {n_experts} experts")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and factor <= 0:
                raise ValueError(f"{name} must be positive, or None to drop nothing; got {factor}")
        if min(balance_weight, z_loss_weight, penalty_weight) < 0:
            raise ValueError(
                f"loss weights must not be negative, got {balance_weight=}, {z_loss_weight=}, {penalty_weight=}"
            )
        self.penalty_weight = penalty_weight
        width = torch.ones(n_experts) if widths is None else torch.tensor(widths, dtype=torch.float32)
        self.register_buffer("width", width / width.mean(), persistent=False)
        self.top_k, self.renormalise = top_k, renormalise
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.balance_weight, self.z_loss_weight = balance_weight, z_loss_weight

    @property
    def active_experts(self) -> float:
        """Experts computed per token when nothing is dropped."""
        return self.top_k

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Groups, Tensor, dict[str, Tensor]]:
        return self.choose(self.logits(x.flatten(0, 1)), None if mask is None else mask.flatten())

    def choose(self, logits: Tensor, mask: Tensor | None) -> tuple[Groups, Tensor, dict[str, Tensor]]:
        """logits (t e), mask (t) -> as `forward`."""
        p = logits.softmax(-1)
        weight, expert = p.topk(self.top_k, dim=-1)  # (t k)
        if self.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        groups = group_by_expert(expert, self.n_experts, self.capacity(p.shape[0], mask), mask)
        return groups, weight.flatten()[groups.choice], self.losses(logits, p, groups, mask)

    def capacity(self, n_tokens: int, mask: Tensor | None) -> int | Tensor | None:
        """Choices that one expert may compute; a tensor when the number of real tokens is one, (e) in a window."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return None
        if self.training and self.window is not None:  # what the earlier micro-batches have left
            whole = max(1, int(factor * self.window.tokens * self.top_k / self.n_experts))
            taken = sum(self.window.counts[: self.window.index], torch.zeros(self.n_experts, device=self.gate.device))
            return (whole - taken).clamp(min=0).long()
        if mask is None:
            return min(max(1, int(factor * n_tokens * self.top_k / self.n_experts)), n_tokens)
        return (mask.sum().double() * factor * self.top_k / self.n_experts).long().clamp(min=1)

    def losses(self, logits: Tensor, p: Tensor, groups: Groups, mask: Tensor | None) -> dict[str, Tensor]:
        real = torch.ones_like(p[:, 0]) if mask is None else mask.to(p.dtype)  # (t)
        n = real.sum().clamp(min=1)
        mass, squares = real @ p, real @ logits.logsumexp(-1).square() if self.z_loss_weight else n * 0  # (e) ()
        counts, total = groups.counts.to(p.dtype), n
        if self.training and self.window is not None:
            counts, mass, squares, total = self._in_window(counts, mass, squares, n)
        elif self.training and _distributed():
            counts, mass, squares, total = _over_all_processes(counts, mass, squares, n)
        aux = {}
        if self.balance_weight:
            aux["load_balancing_loss"] = self.balance_weight * self.n_experts * (counts * mass).sum() / total.square()
        if self.penalty_weight:
            cost = (counts * self.width.to(mass.dtype) * mass).sum()
            aux["parameter_penalty_loss"] = self.penalty_weight * self.n_experts * cost / total.square()
        if self.z_loss_weight:
            aux["z_loss"] = self.z_loss_weight * squares / total
        with torch.no_grad():
            aux["tokens_per_expert"] = groups.counts / n  # (e) share of tokens, before dropping; sums to k
            aux["dropped_fraction"] = 1 - groups.ends[-1] / (n * self.top_k)
            aux["router_entropy"] = (real @ -torch.xlogy(p, p).sum(-1)) / n  # nats; ln e when undecided
        return aux

    def _in_window(self, counts: Tensor, mass: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """The window's counts and tokens, and this part's mass and squares times the number of parts that will be
        averaged. In the first pass the counts are taken down and nothing else matters."""
        window = self.window
        if window.counting:
            window.counts.append(counts)
            return counts, mass, squares, n
        parts = window.micro_batches * (dist.get_world_size() if _distributed() else 1)
        return window.chosen.to(n.dtype), parts * mass, parts * squares, window.total.to(n.dtype)


class ExpertChoice(Router):
    """Every expert takes its round(fraction n) of n candidates with the largest probability: perfect balance, no loss.

    fraction        of the candidates, in (0, 1]
    softmax_over    "tokens": p is normalised over an expert's candidates; "experts": over a token's experts
    group_by_batch  the candidates are the batch rows at one time position: nothing leaks along time, but outputs
                    depend on batch mates. Otherwise they are all tokens, and the choice looks into the future
    group_size      > 1 first regroups the tokens (b l) to (group_size, b l / group_size)
    z_loss_weight   w of  w mean_t logsumexp(s_t)^2, over the tokens of this process and micro-batch
    Not usable for decoding token by token.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        fraction: float,
        softmax_over: str = "tokens",
        group_by_batch: bool = False,
        group_size: int = 1,
        jitter: float = 0.0,
        init_scale: float = 0.1,
        z_loss_weight: float = 0.0,
    ):
        super().__init__(d_model, n_experts, jitter, init_scale)
        if z_loss_weight < 0:
            raise ValueError(f"loss weights must not be negative, got {z_loss_weight=}")
        self.z_loss_weight = z_loss_weight
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction of the tokens per expert must lie in (0, 1], got {fraction}")
        if softmax_over not in ("tokens", "experts"):
            raise ValueError(
                f"softmax_over must be 'tokens' or 'experts', got {softmax_over!r}"
                f"{nearest(str(softmax_over), ('tokens', 'experts'))}"
            )
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}")
        self.fraction, self.softmax_over = fraction, softmax_over
        self.group_by_batch, self.group_size = group_by_batch, group_size

    @property
    def active_experts(self) -> float:
        return self.fraction * self.n_experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Groups, Tensor, dict[str, Tensor]]:
        b, l = x.shape[:2]
        if self.group_size > 1:
            if b * l % self.group_size:
                raise ValueError(f"group_size = {self.group_size} does not divide the {b * l} tokens of the batch")
            b, l = self.group_size, b * l // self.group_size
        n, positions = (b, l) if self.group_by_batch else (b * l, 1)  # candidates, independent choices
        take = round(self.fraction * n)
        if take < 1:
            raise ValueError(
                f"every expert would take round({self.fraction} * {n}) = 0 of its {n} candidates; raise "
                f"the fraction or the {'batch size' if self.group_by_batch else 'number of tokens'}"
            )
        logits = self.logits(x.reshape(n, positions, -1))  # (n positions e)
        real = None if mask is None else mask.reshape(n, positions, 1)
        scores = logits if real is None else logits.masked_fill(~real, torch.finfo(logits.dtype).min)
        p = scores.softmax(0 if self.softmax_over == "tokens" else 2)
        p = p if real is None else p.masked_fill(~real, 0)
        weight, candidate = p.permute(2, 0, 1).topk(take, dim=1)  # (e take positions)
        token = (candidate * positions + torch.arange(positions, device=x.device)).flatten()
        rows = take * positions
        counts = torch.full((self.n_experts,), rows, device=x.device)
        ends = counts.cumsum(0).to(torch.int32)
        groups = Groups(torch.arange(token.numel(), device=x.device), token, ends, counts)
        aux = self.metrics(logits, token, mask, n * positions)
        if self.z_loss_weight:
            squares, counted = logits.logsumexp(-1).square(), 1.0 if real is None else real[..., 0].to(logits.dtype)
            total = squares.numel() if real is None else counted.sum().clamp(min=1)
            aux["z_loss"] = self.z_loss_weight * (squares * counted).sum() / total
        return groups, weight.flatten(), aux

    @torch.no_grad()
    def metrics(self, logits: Tensor, token: Tensor, mask: Tensor | None, n_tokens: int) -> dict[str, Tensor]:
        real = logits.new_ones(n_tokens) if mask is None else mask.flatten().to(logits.dtype)
        n = real.sum().clamp(min=1)
        chosen = torch.zeros_like(real).index_fill(0, token, 1.0)
        p = logits.softmax(-1).flatten(0, 1)
        per_expert = real[token].view(self.n_experts, -1).sum(1)
        return {
            "tokens_per_expert": per_expert / n,
            "dropped_fraction": 1 - (chosen * real).sum() / n,
            "router_entropy": (real @ -torch.xlogy(p, p).sum(-1)) / n,
        }


def _over_all_processes(counts: Tensor, mass: Tensor, squares: Tensor, n: Tensor) -> tuple[Tensor, ...]:
    """Sums over the data-parallel group. Only the local parts of `mass` and `squares` carry a gradient, times the
    number of processes, because averaging the gradients over them (as DDP does) divides by it again."""
    e = counts.numel()
    totals = torch.cat([counts, mass.detach(), squares.detach()[None], n[None]])
    dist.all_reduce(totals)
    world = dist.get_world_size()
    mass, squares = (world * (part - part.detach()) for part in (mass, squares))
    return totals[:e], totals[e : 2 * e] + mass, totals[-2] + squares, totals[-1]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
