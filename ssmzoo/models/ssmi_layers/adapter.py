"""A frozen model with memories in it, called like the language models of this zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.decoder import Block
from ssmzoo.layers.state import ModelOutput
from ssmzoo.models.ssmi_layers.hosts import OnFrozen, check_visual, chosen_layers, find_layers, put, width
from ssmzoo.models.ssmi_layers.memory import Memory, MemoryState


class HostState(NamedTuple):
    """Of a model of Hugging Face's: nothing in it is changed by a later pass."""

    keys: tuple[tuple[Tensor, Tensor], ...]  # (b j s p) keys and values of every layer
    mask: Tensor  # (b s) True = real token
    memories: tuple[MemoryState, ...]


class SSMI(OnFrozen):
    """ids (b t), visual (b m w) -> ModelOutput(logits (b t v), state, {}); only the memories are trained.

    backbone     the model, which is changed in place and frozen: one of Hugging Face's with LLaMA's, GPT-NeoX's or
                 BERT's layers, or a decoder of this zoo
    visual_dim   w
    layers       all | every_k | last_k | numbers of the layers that get a memory
    share        one memory for all of them
    max_share    largest share of trained parameters; more is refused
    memory       further arguments of `Memory`

    state        what a call returned, for the tokens behind; the visual tokens were given in the first one
    mask         (b t) True = real token, padding on either side

    Logits are the last hidden states for a model without a head. BERT reads in both directions: it takes no state, and
    its memories read the text from left to right. Raises ValueError, and leaves the model as it is, for layers that
    are not known or have memories already, and above max_share.
    """

    def __init__(
        self,
        backbone: nn.Module,
        visual_dim: int,
        layers: str | Sequence[int] = "all",
        share: bool = False,
        max_share: float = 1.0,
        **memory: Any,
    ):
        super().__init__()
        self.host, found = find_layers(backbone)
        self.chosen = chosen_layers(layers, len(found))
        self.options = {"layers": layers, "share": share, **memory}
        self.visual_dim, d, device = visual_dim, width(found[0]), next(backbone.parameters()).device
        count = 1 if share else len(self.chosen)
        self.memories = nn.ModuleList(Memory(d, visual_dim, **memory) for _ in range(count)).to(device)
        refuse_above(max_share, count_of(self.memories), count_of(self.memories, backbone))
        self.backbone = backbone.requires_grad_(False).eval()
        self.at = [self.memories[0 if share else i] for i in range(len(self.chosen))]  # of every chosen layer
        self.sites = [put(self.host, found[layer], memory) for layer, memory in zip(self.chosen, self.at)]
        self.native = isinstance(found[0], Block)
        self.mixers = [layer.mixers for layer in found] if self.native else []

    def forward(
        self, input_ids: Tensor, state: Any = None, *, visual: Tensor | None = None, mask: Tensor | None = None
    ) -> ModelOutput:
        check_visual(visual, state, input_ids)
        memories = [None if visual is None else memory.read(visual.detach()) for memory in self.at]
        if self.native:
            return self.backbone(input_ids, self.begin(memories) if state is None else state, mask=mask)
        return self._hosted(input_ids, state, memories, mask)

    def begin(self, memories: Sequence[MemoryState | None]) -> tuple | None:
        """The state in front of a text of a model of this zoo: nothing but what the memories have seen."""
        if all(m is None for m in memories):
            return None
        by_layer = dict(zip(self.chosen, memories))
        return tuple(
            {"memory": by_layer[i], **{n: None for n in names if n != "memory"}} if i in by_layer else None
            for i, names in enumerate(self.mixers)
        )

    def _hosted(
        self, input_ids: Tensor, state: HostState | None, memories: Sequence[MemoryState | None], mask: Tensor | None
    ) -> ModelOutput:
        more: dict[str, Any] = {}
        whole = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
        if not self.host.causal and state is not None:
            raise ValueError(f"{type(self.backbone).__name__} reads in both directions: it takes no state")
        if self.host.causal:
            from transformers import DynamicCache

            if state is not None:
                memories, whole = state.memories, torch.cat([state.mask, whole], dim=1)
            more["past_key_values"] = DynamicCache(None if state is None else state.keys)
            position = whole.long().cumsum(1)[:, -input_ids.shape[1] :] - 1
            more |= {"use_cache": True, "position_ids": position.clamp(min=0)}
        for site, memory in zip(self.sites, memories):
            site.hand_in(memory, mask)
        plain = mask is None and (state is None or bool(state.mask.all()))
        out = self.backbone(input_ids=input_ids, attention_mask=None if plain else whole.long(), **more)
        after = tuple(site.after for site in self.sites)
        for site in self.sites:
            site.hand_in(None, None)
        logits = out.logits if hasattr(out, "logits") else out.last_hidden_state
        if not self.host.causal:
            return ModelOutput(logits, None, {})
        keys = tuple((layer.keys, layer.values) for layer in out.past_key_values.layers)
        return ModelOutput(logits, HostState(keys, whole, after), {})

    def reconstruction(self, visual: Tensor) -> Tensor:
        """Scalar: mean of the memories' `reconstruction`, for alignment."""
        return torch.stack([memory.reconstruction(visual) for memory in self.memories]).mean()

    def trainable(self) -> tuple[int, int]:
        """(parameters that are trained, all of them)"""
        return count_of(self.memories), count_of(self)


def count_of(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def refuse_above(most: float, some: int, total: int) -> None:
    """Raise ValueError when more than a share `most` of all parameters would be trained."""
    if some > most * total:
        raise ValueError(
            f"{some:,} of {total:,} parameters ({100 * some / total:.2f} %) would be trained, more than "
            f"max_share={most}: lower rank, set layers or share, or raise max_share"
        )
