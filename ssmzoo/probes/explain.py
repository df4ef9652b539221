"""Explanations of one prediction, by every method of the probes, for language and image models alike.

    raw          mean over layers of what the read-out tokens attend to, |alpha| averaged over channels
    rollout      read-out rows of the product over layers of row-normalised I + |alpha|
    attribution  the same with clamp(alpha) scaled to [0, 1] and its columns weighted by the gradient of the logit at
                 the layer's input
    lrp, gradient_x_input, integrated_gradients     see mamba_lrp

Attention of several directions is added, token by token. In a pyramid the rollout runs within every stage; the map is
that of the last stage whose scans see the whole map, enlarged to the first one's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.layers.norm import RMSNorm
from ssmzoo.layers.plain import observer
from ssmzoo.probes import attribution_maps as maps
from ssmzoo.probes.attention_matrices import MATRIX_BYTES, WORK, attention, class_row, matrix_bytes
from ssmzoo.probes.attribution_maps import gradient_weight, min_max, rollout
from ssmzoo.probes.entry import Entry
from ssmzoo.probes.mamba_lrp import ALL, integrated_gradients, relevance
from ssmzoo.probes.modules import own_modules
from ssmzoo.probes.scan import Scan, Taps
from ssmzoo.probes.softmax_attention import Attention
from ssmzoo.probes.tap import tap

NORMS = (RMSNorm, nn.LayerNorm)
ATTENTION_METHODS = ("raw", "rollout", "attribution")
METHODS = ("lrp", "gradient_x_input", "integrated_gradients", *ATTENTION_METHODS)


class Streams:
    """The residual stream entering every module: the input of the norm that was last called before it; and the input of
    every norm by name."""

    def __init__(self, model: nn.Module):
        self.model, self.latest, self.of, self.normed, self.hooks = model, None, {}, {}, []

    def __enter__(self) -> Streams:
        for name, module in self.model.named_modules():
            if isinstance(module, NORMS):
                self.hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: self.see(name, x)))
        for name, module in own_modules(self.model):
            assign = observer(lambda m, x, name=name: self.assign(name))
            self.hooks.append(module.register_forward_pre_hook(assign))
        return self

    def see(self, name: str, inputs: tuple) -> None:
        self.latest = self.normed[name] = inputs[0]

    def assign(self, name: str) -> None:
        self.of[name] = self.latest

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def token_map(
    scan: Scan | Attention,
    function: Callable[[Tensor], Tensor] = torch.abs,
    every: int = 1,
    max_bytes: int = MATRIX_BYTES,
) -> Tensor:
    """function(alpha) averaged over the channels of every direction and added over directions: (b l l) by tokens.

    every  use only every so many channels | max_bytes  what the matrices at work may take, a few channels at a time

    Where a scan saw the mean of all tokens as one more (Adventurer), what is read from it is read from all alike.
    """
    return token_maps(scan, [function], every, max_bytes)[0]


def token_maps(
    scan: Scan | Attention,
    functions: Sequence[Callable[[Tensor], Tensor]],
    every: int = 1,
    max_bytes: int = MATRIX_BYTES,
) -> list[Tensor]:
    """`token_map` of several functions, from matrices that are made once."""
    chosen = list(range(0, len(scan.channels), every))
    chunk = max(1, min(16, max_bytes // matrix_bytes(scan) - 2 * WORK))
    totals: list[Tensor | float] = [0.0] * len(functions)
    for i in range(0, len(chosen), chunk):
        alpha = attention(scan.take(chosen[i : i + chunk]), max_bytes=max_bytes)
        totals = [total + function(alpha).sum(1) for total, function in zip(totals, functions)]
    totals = [total * scan.directions / len(chosen) for total in totals]
    if scan.extra:
        l = scan.length - scan.extra
        totals = [t[:, :l, :l] + t[:, :l, l:].sum(2, keepdim=True) / l for t in totals]
    return totals


class Layers(NamedTuple):
    """Per scan: its record, token maps (b l l) of |alpha| and of clamp(alpha), the gradient of the logit at the stream
    that enters it (b l w), and the weight (b l) made of that."""

    scans: Taps
    absolute: list[Tensor]
    positive: list[Tensor]
    gradient: list[Tensor]
    weight: list[Tensor]


def attention_layers(
    entry: Entry, target: Tensor, max_channels: int = 64, layers=None, channels=None, max_bytes: int = MATRIX_BYTES
) -> Layers:
    """Token maps of every scan and attention over whole sequences, and the gradients at the streams that enter them.

    max_channels per layer, evenly spread | layers, channels, max_bytes  as in `tap`; the last for the maps too
    """
    tapped = tap(entry.model, layers, channels, max_bytes=max_bytes, attention=True)
    with Streams(entry.model) as streams, tapped as scans, torch.enable_grad():
        logits = entry.logits(entry.values.detach().requires_grad_())
        logit = logits.gather(1, target[:, None]).sum()
    scans = Taps(s for s in scans if isinstance(s, (Scan, Attention)) and s.batch == len(logits))
    if not scans:
        raise ValueError(
            f"{type(entry.model).__name__} has no diagonal scan and no attention over whole sequences whose weights "
            f"could be shown; the methods lrp, gradient_x_input and integrated_gradients apply"
        )
    gradients = torch.autograd.grad(logit, [streams.of[s.name] for s in scans])
    with torch.no_grad():
        every = [max(1, len(s.channels) // max_channels) for s in scans]
        both = [token_maps(s, (torch.abs, F.relu), n, max_bytes) for s, n in zip(scans, every)]
        absolute, positive = [a for a, _ in both], [min_max(p, (1, 2)) for _, p in both]
        gradients = [g.reshape(len(g), -1, g.shape[-1]) for g in gradients]
        weight = [gradient_weight(g) for g in gradients]
    return Layers(scans, absolute, positive, gradients, weight)


def attention_scores(entry: Entry, layers: Layers, method: str) -> Tensor:
    """Scores (b l) of the entry's vectors for "raw", "rollout" or "attribution"."""
    if method not in ATTENTION_METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(ATTENTION_METHODS)}")
    lengths = [a.shape[-1] for a in layers.absolute]
    stage = [i for i, n in enumerate(lengths) if n == lengths[-1]]
    if method == "raw":
        scores = torch.stack([min_max(read_out(entry, layers.absolute[i]), (1,)) for i in stage]).mean(0)
    elif method == "rollout":
        scores = read_out(entry, rollout([layers.absolute[i] for i in stage]))
    else:
        weighted = [layers.positive[i] * layers.weight[i][:, None] for i in stage]
        scores = read_out(entry, rollout(weighted))
    return enlarge(entry, scores)


def class_row_scores(entry: Entry, layers: Layers, start: int = 0) -> dict[str, Tensor]:
    """The released code's maps for an encoder with one class token and two directions (Vim): scores (b m) of the
    patches by "raw_cls_row", "rollout_cls_row" and "attribution_cls_row"; {} for other models.

    start  first layer that counts (15 of 24 in the released code)
    """
    if len(entry.special) != 1 or any(s.directions != 2 or s.total != len(s.channels) for s in layers.scans):
        return {}
    token = entry.special[0]
    rows = torch.stack([class_row(s, token, missing_decay=True) for s in layers.scans], dim=1)  # (b m d l)
    gradient = torch.stack(layers.gradient, dim=1)  # (b m l w)
    return {
        "raw_cls_row": torch.cat([maps.raw(r, token, start) for r in rows]),
        "rollout_cls_row": torch.cat([maps.rollout_cls_row(r, token, start) for r in rows]),
        "attribution_cls_row": torch.cat([maps.attribution(r, g, token, start) for r, g in zip(rows, gradient)]),
    }


def read_out(entry: Entry, matrix: Tensor) -> Tensor:
    """The row (b l) of the tokens that the prediction is read from: class tokens, all patches, or the last token."""
    if entry.grid is None:
        return matrix[:, -1]
    special = [t for t in entry.special if t < matrix.shape[1]]
    return matrix[:, special].mean(1) if special else matrix.mean(1)


def enlarge(entry: Entry, scores: Tensor) -> Tensor:
    """Scores of a coarser map -> the entry's grid (b l)."""
    if entry.grid is None or scores.shape[1] == entry.values.shape[1]:
        return scores
    ratio = (scores.shape[1] / (entry.grid[0] * entry.grid[1])) ** 0.5
    coarse = round(entry.grid[0] * ratio), round(entry.grid[1] * ratio)
    if coarse[0] * coarse[1] != scores.shape[1]:
        raise ValueError(
            f"scores of {scores.shape[1]} positions do not form a reduced {entry.grid[0]} x {entry.grid[1]} map"
        )
    return F.interpolate(scores.unflatten(1, coarse)[:, None], entry.grid, mode="bilinear")[:, 0].flatten(1)


def explain(entry: Entry, target: Tensor, method: str, steps: int = 32, max_channels: int = 64, on=ALL) -> Tensor:
    """Scores (b l) of the entry's vectors for the logits of `target` (b); see METHODS.

    steps         of integrated_gradients | max_channels   per layer, for attention | on   rules of lrp
    """
    if method in ATTENTION_METHODS:
        return attention_scores(entry, attention_layers(entry, target, max_channels), method)
    if method == "integrated_gradients":
        return integrated_gradients(entry.logits, entry.values, target, steps)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    return relevance(entry.logits, entry.model, entry.values, target, on=on if method == "lrp" else ()).relevance
