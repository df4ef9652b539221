"""SSMI: a frozen language model that is shown pictures through a selective state-space memory in its layers.

    a = h + Attention(norm(h));   m = a + Memory(a, V);   h' = m + FeedForward(norm(m))       in every chosen layer

V are visual tokens, which every memory reads before the text. Only memories are trained; `Memory` says what is in them
(`ssmzoo/models/ssmi_layers/memory.py`), `hosts.py` beside it where they go, in models of Hugging Face's too: for these
`ssmzoo.adapt.ssmi.add_ssmi` is the way in, and `SSMI` what it returns. `VisualDecoder` is the form that train.py
builds: a small decoder of this zoo, and SSMI on it, or LoRA to compare with.

The paper states H_l = FFN(SSM(MHSA(H_{l-1}), V)) and s_{t+1} = A s_t + B h_t, y_t = C s_t + D h_t, two stages of
training and a share of about 0.5 % of trained parameters. Ours: the residual around the memory (without one a frozen
model would not be itself at the start), W_up = 0, gamma, the bottleneck, selection, the memory's place in layers with
parallel residual or a norm behind, and how V enters.
Source: Selective State Space Memory for Large Vision-Language Models (arXiv 2412.09875); there is no released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.decoder import check_sizes
from ssmzoo.layers.state import ModelOutput
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.ssmi_layers.adapter import SSMI, count_of, refuse_above
from ssmzoo.models.ssmi_layers.lora import VisualLoRA
from ssmzoo.models.ssmi_layers.memory import INJECT, Memory
from ssmzoo.suggest import nearest

__all__ = ["SSMI", "Memory", "VisualDecoder"]

DECODERS, ADAPTERS = ("transformer", "mamba"), ("ssmi", "lora")


class VisualDecoder(nn.Module):
    """ids (b t), visual (b m w) -> ModelOutput(logits (b t v), state, {}).

    vocab_size, visual_dim   v, w
    decoder, d_model, n_layer   transformer or mamba, its width and number of blocks; it is frozen
    adapter     ssmi, or lora: as many trained parameters as ssmi has with the same other arguments, or fewer
    inject      prefix | add | none: how visual tokens enter the memories, or the embedded text in front of LoRA
    rank, d_state, expand, selective, gamma, layers, share   of the memories, see `SSMI` and `Memory`
    lora_rank   None: by the number of parameters
    max_share   largest share of trained parameters; more is refused
    """

    first_stage = "reader.backbone"  # a file that holds the decoder's weights alone fills this part (init_from)

    def __init__(
        self,
        vocab_size: int = 256,
        visual_dim: int = 16,
        decoder: str = "transformer",
        d_model: int = 128,
        n_layer: int = 4,
        adapter: str = "ssmi",
        inject: str = "prefix",
        rank: int = 32,
        d_state: int = 16,
        expand: float = 1,
        selective: bool = True,
        gamma: str = "scalar",
        layers: str | Sequence[int] = "all",
        share: bool = False,
        lora_rank: int | None = None,
        max_share: float = 0.1,
    ):
        super().__init__()
        check_sizes(vocab_size=vocab_size, visual_dim=visual_dim, d_model=d_model, n_layer=n_layer, rank=rank)
        for name, value, known in (
            ("decoder", decoder, DECODERS),
            ("adapter", adapter, ADAPTERS),
            ("inject", inject, INJECT),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}{nearest(str(value), known)}; choose one of {', '.join(known)}")
        if lora_rank is not None and adapter != "lora":
            raise ValueError(f"lora_rank is {lora_rank}, but adapter is {adapter}: leave it out, or set adapter=lora")
        self.decoder = (decoder, vocab_size, d_model, n_layer)
        self.register_buffer("trained", torch.zeros(()))  # steps of the decoder; pictures mean nothing to a random one
        options = dict(inject=inject, rank=rank, d_state=d_state, expand=expand, selective=selective, gamma=gamma)
        if adapter == "ssmi":
            self.reader = SSMI(self.plain_decoder(), visual_dim, layers, share, max_share, **options)
        else:
            with torch.device("meta"):
                twin = SSMI(self.plain_decoder(), visual_dim, layers, share, **options | {"inject": "prefix"})
            self.reader = VisualLoRA(self.plain_decoder(), visual_dim, inject, lora_rank, count_of(twin.memories))
            refuse_above(max_share, *self.trainable())
        self.reader.backbone.register_load_state_dict_post_hook(self._note_weights)

    def _note_weights(self, decoder: nn.Module, keys: Any) -> None:
        """Whoever brings weights of the decoder brings a trained one."""
        self.trained.clamp_(min=1)

    def trainable(self) -> tuple[int, int]:
        """(parameters that are trained, all of them)"""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, on in counts if on), sum(n for n, _ in counts)

    def plain_decoder(self) -> nn.Module:
        """A decoder of the same sizes without anything in it, with fresh weights."""
        kind, vocab_size, d_model, n_layer = self.decoder
        if kind == "mamba":
            return MambaLM(vocab_size, d_model, n_layer)
        heads = next(h for h in range(max(1, d_model // 32), 0, -1) if d_model % (2 * h) == 0 or h == 1)
        return TransformerLM(vocab_size, d_model, n_layer, heads)

    def forward(
        self, input_ids: Tensor, state: Any = None, *, visual: Tensor | None = None, mask: Tensor | None = None
    ) -> ModelOutput:
        return self.reader(input_ids, state, visual=visual, mask=mask)
