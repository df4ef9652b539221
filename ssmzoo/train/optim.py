"""Optimisers: which parameters decay, which optimiser takes them, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ssmzoo.layers.roles import TABLES, named_role
from ssmzoo.suggest import nearest
from ssmzoo.train.stages import stage_of

DECAY_RULES = ("roles", "shape", "all")


def parameter_roles(model: nn.Module, rule: str = "roles") -> dict[str, str]:
    """{parameter name: "decay" or the reason why not}.

    roles   matrices and convolution kernels decay; A_log, D, biases (dt's among them), norms, embeddings, positional
            tables and whatever `model.no_weight_decay()` lists do not
    shape   whatever has two or more dimensions decays, A_log and the directions' dt biases among it, but for positional
            tables and class tokens: what the released image codes do
    all     everything decays (some published recipes)
    """
    if rule not in DECAY_RULES:
        raise ValueError(f"optim.decay is {rule!r}; choose one of {', '.join(DECAY_RULES)}{nearest(rule, DECAY_RULES)}")
    listed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    roles = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full, named = f"{module_name}.{name}" if module_name else name, named_role(name)
            if rule == "all":
                roles[full] = "decay"
            elif rule == "shape":
                flat = "one dimension" if parameter.ndim < 2 else "decay"
                roles[full] = named if named in TABLES else flat
            elif isinstance(module, nn.Embedding):
                roles[full] = "embedding"
            elif named is not None:
                roles[full] = named
            elif full in listed:
                roles[full] = "listed by the model"
            elif parameter.ndim < 2 or "norm" in type(module).__name__.lower():
                roles[full] = "norm or scale"
            else:
                roles[full] = "decay"
    return roles


def schedule(
    kind: str,
    total_steps: int,
    warmup_steps: float,
    min_lr_ratio: float,
    milestones: Sequence[float] = (),
    gamma: float = 0.5,
    decay_fraction: float = 0.2,
    hold_steps: int = 0,
    warmup_lr_ratio: float | None = None,
    warmup_prefix: bool = True,
    stair_steps: int = 1,
    cooldown_steps: int = 0,
) -> Callable[[int], float]:
    """Factor on the peak learning rate at a step: linear warm-up from `warmup_lr_ratio` (1/warmup_steps) over
    `warmup_steps`, below 1 a share of the run; then

    constant  1;  cosine  1 -> min_lr_ratio at total_steps;  linear  the same in a straight line;
    wsd       1, and over the last `decay_fraction` of the run linearly to min_lr_ratio;
    multistep times `gamma` at every step listed in milestones; one below 1 is a share of the run

    cosine and linear begin after `hold_steps` more steps at the peak, or at step 0, under the warm-up, without
    `warmup_prefix`. The factor moves every `stair_steps` steps; in the last `cooldown_steps` it is min_lr_ratio / 10.
    """
    kinds = ("constant", "cosine", "linear", "wsd", "multistep")
    if kind not in kinds:
        raise ValueError(f"optim.schedule is {kind!r}; choose one of {', '.join(kinds)}{nearest(str(kind), kinds)}")
    warmup_steps = round(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    total_steps = max(total_steps, warmup_steps + 1)

    def factor(step: int) -> float:
        if cooldown_steps and step >= total_steps - cooldown_steps:
            return min_lr_ratio / 10
        step = step // stair_steps * stair_steps
        if step < warmup_steps:
            if warmup_lr_ratio is None:
                return (step + 1) / warmup_steps
            return warmup_lr_ratio + (1 - warmup_lr_ratio) * step / warmup_steps
        held = hold_steps if kind in ("cosine", "linear") else 0
        start = min(warmup_steps + held, total_steps - 1) if warmup_prefix else 0
        done = min(1.0, max(0, step - start) / (total_steps - start))
        if kind == "cosine":
            return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
        if kind == "linear":
            return 1 - (1 - min_lr_ratio) * done
        if kind == "wsd":
            return 1 - (1 - min_lr_ratio) * max(0.0, (done - (1 - decay_fraction)) / decay_fraction)
        passed = sum(step >= (m if m >= 1 else m * total_steps) for m in milestones)
        return gamma**passed if kind == "multistep" else 1.0

    return factor


def fused(groups: list[dict]) -> bool | None:
    """Adam in one kernel per tensor on a CPU, a third of the time there; elsewhere torch chooses (None)."""
    parameters = [p for g in groups for p in g["params"]]
    return all(p.device.type == "cpu" and p.is_floating_point() for p in parameters) or None


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, as one optimiser, so that a loop written for one needs no change."""

    def __init__(self, matrices: list[dict], rest: list[dict], lr: float, adamw_lr: float, betas, eps: float):
        self.parts = [torch.optim.Muon(matrices, lr=lr)] if matrices else []
        self.parts += [torch.optim.AdamW(rest, lr=adamw_lr, betas=betas, eps=eps, fused=fused(rest))] if rest else []
        super().__init__([g for p in self.parts for g in p.param_groups], {})
        self._share()

    def _share(self) -> None:
        """One list of groups and one state, seen by both parts: schedules and checkpoints act on this object."""
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        self._share()


def build(
    model: nn.Module,
    *,
    total_steps: int,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    schedule_kind: str = "cosine",
    warmup_steps: float = 0,
    min_lr_ratio: float = 0.1,
    milestones: Sequence[float] = (),
    gamma: float = 0.5,
    hold_steps: int = 0,
    warmup_lr_ratio: float | None = None,
    warmup_prefix: bool = True,
    stair_steps: int = 1,
    cooldown_steps: int = 0,
    layer_decay: float = 1.0,
    lr_scale: dict[str, float] | None = None,
    decay: str = "roles",
    adamw_lr: float | None = None,
) -> dict:
    """What a LightningModule's `configure_optimizers` returns.

    name         adamw | adam | sgd | muon (muon: matrices of the network by Muon with `lr`, everything else by AdamW
                 with `adamw_lr`, which defaults to lr)
    lr           peak learning rate;  total_steps  in optimiser steps;  warmup_steps  the same, or a share below 1
    hold_steps   steps at the peak between warm-up and a cosine or linear decay;  the other words of time: `schedule`
    decay        roles | shape | all: which parameters decay, see `parameter_roles`
    layer_decay  < 1: the learning rate of block i of n is multiplied by layer_decay^(n - i), by the model's
                 `group_matcher`, or by the number of the layer where it has none (language models)
    lr_scale     {beginning of parameter names: factor on their learning rate}

    Raises ValueError for values out of range.
    """
    not_negative = {
        "lr": lr,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "hold_steps": hold_steps,
        "warmup_lr_ratio": warmup_lr_ratio or 0,
        "cooldown_steps": cooldown_steps,
    }
    for key, value in not_negative.items():
        if value < 0:
            raise ValueError(f"optim.{key} is {value}; it must not be negative")
    if stair_steps < 1:
        raise ValueError(f"optim.stair_steps is {stair_steps}; it must be at least 1")
    groups = parameter_groups(model, weight_decay, lr, layer_decay, decay, lr_scale)
    kinds = ("adamw", "adam", "sgd", "muon")
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused(groups))
    elif name == "adam":
        optimizer = torch.optim.Adam(groups, lr=lr, betas=tuple(betas), eps=eps, fused=fused(groups))
    elif name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=betas[0])
    elif name == "muon":
        embedding = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        heads = {id(p) for n, p in model.named_parameters() if "head" in n}
        chosen = {id(p) for p in model.parameters() if p.ndim == 2} - embedding - heads
        chosen -= {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
        split = [
            (
                {**g, "params": [p for p in g["params"] if id(p) in chosen]},
                {**g, "params": [p for p in g["params"] if id(p) not in chosen]},
            )
            for g in groups
        ]
        adamw_lr = lr if adamw_lr is None else adamw_lr
        rest = [{**r, "lr": r["lr"] * adamw_lr / lr} for _, r in split if r["params"]]
        optimizer = MuonWithAdamW([m for m, _ in split if m["params"]], rest, lr, adamw_lr, tuple(betas), eps)
    else:
        raise ValueError(f"optim.name is {name!r}; choose one of {', '.join(kinds)}{nearest(str(name), kinds)}")
    factor = schedule(
        schedule_kind,
        total_steps,
        warmup_steps,
        min_lr_ratio,
        milestones,
        gamma,
        hold_steps=hold_steps,
        warmup_lr_ratio=warmup_lr_ratio,
        warmup_prefix=warmup_prefix,
        stair_steps=stair_steps,
        cooldown_steps=cooldown_steps,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    lr: float,
    layer_decay: float = 1.0,
    decay: str = "roles",
    lr_scale: dict[str, float] | None = None,
) -> list[dict]:
    """Optimiser groups by role (decay or not), with layer_decay < 1 by depth, and by the prefixes of `lr_scale`."""
    roles = parameter_roles(model, decay)
    depth = _depths(model) if layer_decay < 1 else {}
    deepest = max(depth.values(), default=0)
    for prefix in lr_scale or {}:
        if not any(name.startswith(prefix) for name in roles):
            raise ValueError(f"optim.lr_scale: no parameter's name begins with {prefix!r}{nearest(prefix, roles)}")
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = roles[name] == "decay"
        scale = layer_decay ** (deepest - depth.get(name, deepest))
        scale *= math.prod(factor for prefix, factor in (lr_scale or {}).items() if name.startswith(prefix))
        group = groups.setdefault(
            (decays, scale), {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _depths(model: nn.Module) -> dict[str, int]:
    """Depth of every parameter: by timm's grouping of the model's `group_matcher`, or by the number of its layer."""
    if not hasattr(model, "group_matcher"):
        stages = {name: stage_of(model, name) for name, _ in model.named_parameters()}
        last = max((s for s in stages.values() if s is not None), default=-1)
        if last < 0:
            raise ValueError(f"optim.layer_decay needs numbered layers; {type(model).__name__} has none")
        return {name: last + 2 if stage is None else stage + 1 for name, stage in stages.items()}
    from timm.models import group_parameters

    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)


def roles_table(model: nn.Module, rule: str = "roles") -> str:
    """Parameters per role as aligned text: role, tensors, elements, an example."""
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    rows: dict[str, list[str]] = {}
    for name, role in parameter_roles(model, rule).items():
        rows.setdefault(role, []).append(name)
    lines = [f"{'role':<22}{'tensors':>8}{'elements':>14}  example"]
    for role, names in sorted(rows.items(), key=lambda kv: kv[0] != "decay"):
        label = "weight decay" if role == "decay" else f"no decay: {role}"
        total = sum(sizes.get(n, 0) for n in names)
        lines.append(f"{label:<22}{len(names):>8}{total:>14,}  {names[0]}")
    return "\n".join(lines)
