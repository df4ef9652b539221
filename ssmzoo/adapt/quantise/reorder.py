"""Reorder the channels and heads of Mamba-2 mixers so that those which look alike stand together.

    P (channels) and Ph (heads) permute: rows of z and x of in_proj (P), of dt (Ph); channels of x of the convolution;
    A_log, D, dt_bias (Ph); the gated norm and the columns of out_proj (P). B and C stay.

The function stays the same. To be done before rotations, whose output projections no longer have channels as columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssmzoo.adapt.quantise.clusters import CLUSTERS, Order, sort_and_cluster, why_not_clustered
from ssmzoo.adapt.quantise.tap import Taps, run
from ssmzoo.layers.hadamard import HadamardLinear
from ssmzoo.layers.mixers.mamba2 import Mamba2


def mixers(model: nn.Module) -> dict[str, Mamba2]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Mamba2)}


def why_not_reordered(mixer: Mamba2) -> str | None:
    """The reason when the heads of a mixer cannot be clustered, in words."""
    if reason := why_not_clustered(mixer.nheads // mixer.ngroups, mixer.headdim, CLUSTERS):
        return reason
    if mixer.norm is not None and mixer.norm.group_size < mixer.d_ssm // mixer.ngroups:
        return f"its output norm has groups of {mixer.norm.group_size} channels, which heads must not leave"
    return None


@torch.no_grad()
def channel_statistics(model: nn.Module, samples: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """For every mixer: max over the samples of the mean over tokens of |x_c| at the scan's input, (h p)."""
    found: dict[str, Tensor] = {}
    known = mixers(model)

    def see(name: str, y: Tensor) -> None:
        mean = y[..., : known[name].d_ssm].abs().flatten(0, -2).float().mean(0)
        found[name] = torch.maximum(found[name], mean) if name in found else mean

    with Taps() as taps:
        for name in names:
            taps.behind_conv(known[name].conv1d, lambda y, name=name: see(name, y))
        run(model, samples)
    return found


@torch.no_grad()
def reorder(model: nn.Module, samples: Sequence[Tensor], names: Sequence[str] | None = None) -> dict[str, Order]:
    """Reorder the mixers `names` (None: all Mamba-2 mixers) by what they do on the samples; in place.

    Returns the orders, whose clusters share scales. Raises ValueError where heads cannot be clustered.
    """
    known = mixers(model)
    names = list(known) if names is None else list(names)
    for name in names:
        if reason := why_not_reordered(known[name]):
            raise ValueError(f"{name} cannot be reordered: {reason}; quantise without (--no-reorder, reorder=False)")
    statistics = channel_statistics(model, samples, names)
    orders = {}
    for name in names:
        mixer = known[name]
        orders[name] = sort_and_cluster(statistics[name], mixer.headdim, mixer.ngroups)
        permute(mixer, orders[name].channels, orders[name].heads)
    return orders


@torch.no_grad()
def permute(mixer: Mamba2, channels: Tensor, heads: Tensor) -> None:
    """Move channel channels[i] to place i and head heads[i] to place i, everywhere in a mixer."""
    if isinstance(mixer.out_proj, HadamardLinear):
        raise ValueError("the mixer is rotated already: reorder comes before rotate")
    m, p, h = mixer.d_mlp, mixer.d_ssm, mixer.nheads
    total = mixer.in_proj.out_features
    rows = torch.arange(total)
    at = 2 * m
    rows[at : at + p] = at + channels  # z
    rows[at + p : at + 2 * p] = at + p + channels  # x
    rows[total - h :] = total - h + heads  # dt
    convolved = torch.arange(mixer.conv1d.out_channels)
    convolved[:p] = channels
    columns = torch.arange(mixer.out_proj.in_features)
    columns[m:] = m + channels
    take(mixer.in_proj, rows)
    take(mixer.conv1d, convolved)
    mixer.out_proj.weight.copy_(mixer.out_proj.weight[:, columns])
    for name, index in {"A_log": heads, "dt_bias": heads, "D": channels if mixer.options.D_has_hdim else heads}.items():
        parameter = getattr(mixer, name)
        parameter.copy_(parameter[index])
    if mixer.norm is not None:
        mixer.norm.weight.copy_(mixer.norm.weight[channels])
    if mixer.init_states is not None:
        moved = mixer.init_states.flatten(0, 1)[channels]
        mixer.init_states.copy_(moved.unflatten(0, mixer.init_states.shape[:2]))


def take(layer: nn.Module, rows: Tensor) -> None:
    layer.weight.copy_(layer.weight[rows])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[rows])


def cluster_parts(orders: Mapping[str, Order], name: str, mixer: Mamba2) -> Tensor | None:
    """(h p) which scale a channel of the scan's input takes; None for one scale of all."""
    return orders[name].parts() if name in orders else None
