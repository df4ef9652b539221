"""Where an input becomes vectors, and what the model makes of such vectors: the common ground of all explanations.

    entry = enter(model, inputs)          # ids (b l) or images (b c y x)
    logits = entry.logits(entry.values)   # the model's own; with other values, what it would say to those

The values are the embeddings of a language model, the sums of patches, tokens and positions of a plain image encoder,
the patch map of a pyramid, one-hot symbols of an automaton model; all (b l d).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.probes.image_tokens import patch_grid, special_tokens


@dataclass
class Entry:
    """values (b l d) at module `name` ("": the input itself), in shape `shape` there; grid: rows and columns of the
    patches, or None for sequences; special: indices of class tokens."""

    model: nn.Module
    inputs: Tensor
    name: str
    values: Tensor
    shape: torch.Size
    grid: tuple[int, int] | None
    special: tuple[int, ...]

    def output(self, values: Tensor):
        """The model's output with other values (b' l d)."""
        values = values.reshape(len(values), *self.shape[1:])
        if not self.name:
            return self.model(values)
        inputs = self.inputs
        if len(values) != len(inputs):
            inputs = inputs[:1].expand(len(values), *inputs.shape[1:])
        with replaced(self.model.get_submodule(self.name), values):
            return self.model(inputs)

    def logits(self, values: Tensor, position: int = -1) -> Tensor:
        """(b classes): the class logits, or those of a sequence model behind `position`."""
        out = self.output(values)
        out = out.logits if hasattr(out, "logits") else out
        return out[:, position] if out.ndim == 3 else out

    def patches(self, scores: Tensor) -> Tensor:
        """Scores (b l) -> (b m) without class tokens."""
        keep = [i for i in range(scores.shape[1]) if i not in self.special]
        return scores[:, keep]

    def map(self, scores: Tensor) -> Tensor:
        """Scores (b l) or (b m) -> (b rows columns)."""
        if self.grid is None:
            raise ValueError("a sequence has no map; plot its scores along the tokens")
        scores = self.patches(scores) if scores.shape[1] > self.grid[0] * self.grid[1] else scores
        return scores.unflatten(1, self.grid)


@contextlib.contextmanager
def replaced(module: nn.Module, values: Tensor) -> Iterator[None]:
    """Within the block `module` returns `values`."""
    hook = module.register_forward_hook(lambda m, x, y: values.reshape(y.shape))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def enter(model: nn.Module, inputs: Tensor) -> Entry:
    """Find where `inputs` become vectors. ValueError for a model that shows no such point."""
    if not inputs.is_floating_point() and not any(isinstance(m, nn.Embedding) for m in model.modules()):
        if not hasattr(model, "input_size"):
            raise ValueError(f"{type(model).__name__} has no embedding and no input_size: its ids cannot be embedded")
        values = F.one_hot(inputs, model.input_size).float()
        return Entry(model, inputs, "", values, values.shape, None, ())
    name = entrance(model, image=inputs.is_floating_point())
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, x, y: found.append(y))
    try:
        model(inputs)
    finally:
        hook.remove()
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} calls {name} {len(found)} times; relevance needs one entrance")
    values = found[0]
    grid, special, flat = None, (), values
    if inputs.is_floating_point():
        flat = values.flatten(1, 2) if values.ndim == 4 else values
        special = special_tokens(model, flat.shape[1]) if values.ndim == 3 else ()
        grid = tuple(values.shape[1:3]) if values.ndim == 4 else patch_grid(model, *inputs.shape[-2:])
    return Entry(model, inputs, name, flat, values.shape, grid, special)


def entrance(model: nn.Module, image: bool) -> str:
    """Name of the module whose output enters the blocks."""
    if image:
        for name in ("pos_drop", "patch_embed"):
            if isinstance(getattr(model, name, None), nn.Module):
                return name
        raise ValueError(
            f"{type(model).__name__} has neither pos_drop nor patch_embed, where its tokens would enter: "
            f"explanations are for classifiers and sequence models; the probes hidden_attention, dsf and "
            f"generalization_bound look at scans alone"
        )
    return next(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
