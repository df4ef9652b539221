"""What SSMI is compared with: LoRA on every linear layer of the blocks, visual tokens in front of the text.

    inject prefix   [W v_1 .. W v_m ; text]        add   text + W mean(v)        none   text alone

W (d w) is trained as well. Hu et al. 2021, by Hugging Face's `peft`; the visual prefix is the usual one of
vision-language models. The frozen matrices keep their plain names in a state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.roles import in_head
from ssmzoo.layers.state import ModelOutput
from ssmzoo.models.ssmi_layers.hosts import OnFrozen, check_visual, find_layers, width

BASE = "base_layer."  # what peft puts between a layer and its weight


class VisualLoRA(OnFrozen):
    """ids (b t), visual (b m w) -> ModelOutput(logits (b t v), state, {}); called as SSMI, on decoders of this zoo.

    parameters_at_most   how many may be trained: the rank is the largest that leaves the sum below, unless given
    rank                 of LoRA; None: by parameters_at_most

    Raises ValueError when peft is not installed, or not even rank 1 fits.
    """

    def __init__(
        self,
        backbone: nn.Module,
        visual_dim: int,
        inject: str = "prefix",
        rank: int | None = None,
        parameters_at_most: int = 0,
    ):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("adapter=lora needs peft: pip install peft") from None
        _, layers = find_layers(backbone)
        d = width(layers[0])
        linear = {name: m for name, m in backbone.named_modules() if isinstance(m, nn.Linear) and not in_head(name)}
        each = sum(m.in_features + m.out_features for m in linear.values())
        beside = 0 if inject == "none" else visual_dim * d
        rank = (parameters_at_most - beside) // each if rank is None else rank
        if rank < 1:
            raise ValueError(
                f"LoRA of rank 1 has {each + beside:,} parameters, more than the {parameters_at_most:,} of the "
                f"memories: raise rank (of the memories), or give lora_rank"
            )
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(linear))
        self.backbone = inject_adapter_in_model(config, backbone.requires_grad_(False)).eval()
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        for module in self.backbone.modules():
            if hasattr(module, "base_layer"):
                module.register_state_dict_post_hook(_plain_names)
                module.register_load_state_dict_pre_hook(_peft_names)
        self.inject, self.rank = inject, rank
        self.project = None if inject == "none" else nn.Linear(visual_dim, d, bias=False)

    def forward(
        self, input_ids: Tensor, state: Any = None, *, visual: Tensor | None = None, mask: Tensor | None = None
    ) -> ModelOutput:
        """The state is (that of the backbone, what is added to every later token or None)."""
        check_visual(visual, state, input_ids)
        before, added = (None, None) if state is None else state
        x = self.embedding(input_ids)
        m = 0
        if visual is not None and self.inject != "none":
            v = self.project(visual.detach().to(x.dtype))
            if self.inject == "add":
                added = v.mean(1, keepdim=True)
            else:
                m, x = v.shape[1], torch.cat([v, x], dim=1)
                mask = None if mask is None else torch.cat([mask.new_ones(len(mask), m), mask], dim=1)
        x = x if added is None else x + added
        logits, after, aux = self.backbone(x, before, mask=mask)
        return ModelOutput(logits[:, m:], (after, added), aux)

    @property
    def embedding(self) -> nn.Module:
        return next(m for m in self.backbone.modules() if isinstance(m, nn.Embedding))

    def reconstruction(self, visual: Tensor) -> Tensor:
        """Nothing reads the visual tokens one after the other here: 0."""
        return visual.new_zeros(())


def _plain_names(layer: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix + BASE)]:
        state[prefix + key.removeprefix(prefix + BASE)] = state.pop(key)


def _peft_names(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in ("weight", "bias"):
        if prefix + name in state:
            state[prefix + BASE + name] = state.pop(prefix + name)
