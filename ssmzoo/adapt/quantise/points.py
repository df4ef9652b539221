"""Where 8-bit activations are: which points of a mixer are rounded, and which channels share a scale there.

    Mamba-2   in_proj's output by part (z, x, B, C, dt); behind the convolution x by cluster, B and C by SSD group
    Mamba     in_proj's output; x behind the convolution (percentile); x_proj's output (dt, B, C); dt_proj's output

Everywhere else a linear layer's input is rounded on its way in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.clusters import Order
from ssmzoo.adapt.quantise.observers import RunningMax, RunningPercentile
from ssmzoo.adapt.quantise.plan import Settings
from ssmzoo.adapt.quantise.tap import Taps, run
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.layers.quantized import SeparateExperts


@dataclass
class Points:
    """Observers by module name. inputs: of linear layers, one scale; outputs: of linear layers and convolutions, by
    part; parts of the last axis are behind one another: [(observer, channels)]."""

    inputs: dict[str, RunningMax] = field(default_factory=dict)
    outputs: dict[str, list[tuple[RunningMax, int]]] = field(default_factory=dict)

    def input_scale(self, name: str) -> Tensor:
        return self.inputs[name].scale()[0]

    def output_scale(self, name: str) -> Tensor:
        """(c) one scale per channel"""
        pieces = []
        for observer, width in self.outputs[name]:
            scale = observer.scale()
            pieces.append(scale.expand(width) if observer.parts is None else scale[observer.parts])
        return torch.cat(pieces)


def points_of(model: nn.Module, settings: Settings, orders: Mapping[str, Order]) -> Points:
    """The points of a model's layers whose activations have 8 bits."""
    points, experts = (
        Points(),
        {id(m) for bank in model.modules() if isinstance(bank, SeparateExperts) for m in bank.modules()},
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in experts and settings.integer_activations(name):
            points.inputs.setdefault(name, RunningMax())  # a mixer, which comes first, may want another observer
        if isinstance(module, Mamba2) and settings.integer_activations(name):
            mamba2_points(points, name, module, orders.get(name), settings)
        elif isinstance(module, Mamba) and settings.integer_activations(name):
            mamba_points(points, name, module, settings)
    return points


def mamba2_points(points: Points, name: str, m: Mamba2, order: Order | None, settings: Settings) -> None:
    gn = m.ngroups * m.d_state
    widths = [w for w in (m.d_mlp, m.d_mlp, m.d_ssm, m.d_ssm, gn, gn, m.nheads) if w]
    points.outputs[f"{name}.in_proj"] = [(RunningMax(), w) for w in widths]
    groups = torch.arange(m.ngroups).repeat_interleave(m.d_state)
    x = RunningPercentile(alpha=settings.percentile) if order is None else RunningMax(order.parts())
    points.outputs[f"{name}.conv1d"] = [(x, m.d_ssm), (RunningMax(groups), gn), (RunningMax(groups), gn)]


def mamba_points(points: Points, name: str, m: Mamba, settings: Settings) -> None:
    inside = {"": m.in_proj} if isinstance(m.in_proj, nn.Linear) else dict(m.in_proj.named_children())
    for part, linear in inside.items():
        if isinstance(linear, nn.Linear):
            points.outputs[f"{name}.in_proj.{part}".rstrip(".")] = [(RunningMax(), linear.out_features)]
    points.outputs[f"{name}.conv1d"] = [(RunningPercentile(alpha=settings.percentile), m.d_inner)]
    if isinstance(m.x_proj, nn.Linear):
        points.inputs[f"{name}.x_proj"] = RunningPercentile(alpha=settings.percentile)
        points.outputs[f"{name}.x_proj"] = [(RunningMax(), m.x_proj.out_features)]
    points.outputs[f"{name}.dt_proj"] = [(RunningMax(), m.d_inner)]


@torch.no_grad()
def calibrate(model: nn.Module, points: Points, samples: Sequence[Tensor]) -> Points:
    """Let the observers see a float model on the samples, one by one."""
    modules = dict(model.named_modules())
    with Taps() as taps:
        for name, observer in points.inputs.items():
            taps.inputs(modules[name], observer.update)
        for name, parts in points.outputs.items():
            conv = isinstance(modules[name], nn.Conv1d)
            (taps.behind_conv if conv else taps.outputs)(modules[name], lambda y, parts=parts: see(parts, y))
        run(model, samples)
    return points


def see(parts: list[tuple[RunningMax, int]], y: Tensor) -> None:
    for (observer, _), piece in zip(parts, y.split([width for _, width in parts], dim=-1)):
        observer.update(piece)
