"""JRT-RNN as released by HazyResearch/prefix-linear-attention: GPTLMHeadModel and PrefixLinearAttention.

Its convolutions and windows are those of Based. Old files name the convolution conv1 instead of conv.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.state import ModelOutput, left_align
from ssmzoo.models.jrt_rnn import JRTRNNLM, PrefixLinearAttention
from ssmzoo.released import based
from ssmzoo.released.arguments import DEVICE, KERNEL, Arguments
from ssmzoo.released.based import LM_HONOURED, LM_INERT, LM_REFUSED, PLACED, TAYLOR, OfficialSums, from_official

__all__ = ["MODELS", "TABLES", "TELLING_KEYS", "from_official", "golden", "infer", "official", "to_official"]
MODELS = (JRTRNNLM,)
TELLING_KEYS = (r"mixer\.proj_k_enc\.weight", r"mixer\.proj_v_enc\.weight")
ATTENTION = Arguments(
    "PrefixLinearAttention",
    {key: value for key, value in TAYLOR.items() if key != "num_heads"} | {"use_mask": True},
    {
        **{"implementation": ("default", KERNEL), "parallel_implementation": ("default", KERNEL)},
        **{"dec_length": (None, "the rest of a sequence may have any length"), "feature_map": (None, "Taylor's")},
        **{"l_max": (None, "the longest sequence, of which nothing depends")},
        **PLACED,
        **DEVICE,
    },
    {"scale_dim": (None, "the scale of the Taylor features is their number here")},
    required=("num_heads", "enc_length"),  # None there, with which it does not run
)
DATA = {"data_type": ("mixed", "how training data was packed"), "dec_length": (1024, "the rest may have any length")}
LM = Arguments("GPTLMHeadModel", LM_HONOURED | {"enc_length": None}, LM_INERT | DATA, LM_REFUSED)
TABLES = (LM, ATTENTION)


def official(state: dict[str, Tensor], **given):
    """GPTLMHeadModel with the fields of GPT2MixerConfig, or PrefixLinearAttention alone; the first enc_length positions
    are the prefix."""
    if "proj_k_enc.weight" in state:
        config = ATTENTION.complete(given)
        return OfficialPrefix(config["enc_length"], **based.linear(based.width_of(given), config)), state
    config = LM.complete(given)
    prefix = config["enc_length"] or (config["alt_mixer"] or {}).get("enc_length")
    if prefix is None:
        raise TypeError("GPTLMHeadModel: enc_length leaves no trace in the tensors and must be given by name")
    arguments, ours = based.language(config, state)
    letters = based.pattern(config, {"mixer": "C", "alt_mixer": "P", "alt_mixer_2": "S"})
    rows = -(-arguments["vocab_size"] // arguments["pad_vocab_size_multiple"]) * arguments["pad_vocab_size_multiple"]
    spare = arguments["vocab_size"] < rows
    model = OfficialJRT(prefix, **arguments, layer_pattern=letters, mask_row=spare)
    return based.rotary(config, model), ours


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return based.to_official(module, state)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """As of Based; the length of the prefix leaves no trace."""
    return based.infer(state, given)


class OfficialJRT(JRTRNNLM):
    """A first call reads its first enc_length positions, or all if they are fewer, in both directions."""

    def __init__(self, enc_length: int, **arguments):
        super().__init__(**arguments)
        self.enc_length = enc_length

    def forward(self, input_ids: Tensor, state: tuple | None = None, **more) -> ModelOutput:
        mask = more.get("mask")
        if state is None and more.get("seq_idx") is None and more.get("prefix") is None:
            real = input_ids.shape[1] if mask is None else mask.sum(1)
            more["prefix"] = torch.as_tensor(real, device=input_ids.device).clamp(max=self.enc_length)
        return super().forward(input_ids, state, **more)


class OfficialPrefix(OfficialSums, PrefixLinearAttention):
    """forward(x) -> y, with mask (b l) for padding as published, or as `OfficialSums` with x_next."""

    def __init__(self, enc_length: int, **arguments):
        super().__init__(**arguments, exact_mask=False)
        self.enc_length = enc_length

    def forward(self, x: Tensor, mask: Tensor | None = None, x_next: Tensor | None = None):
        if mask is None:
            prefix = torch.full((len(x),), min(x.shape[1], self.enc_length), device=x.device)
            return super().forward(x, x_next, prefix=prefix)
        if x_next is not None:
            raise ValueError("mask and x_next do not go together: a padded call is not continued there")
        padding = left_align(mask.bool())
        y = super().forward(padding.align(x), mask=padding, prefix=padding.lengths.clamp(max=self.enc_length))
        return padding.restore(y)


def golden(case) -> dict[str, Tensor]:
    got = case.run_official()
    return got if "logits" not in got else {"logits": got["logits"]}


CATALOGUE = (
    based.released(
        "jrt_rnn_360m", "JRT-360M-30B", "FDA 82.0, SWDE 43.3, NQ 32.9, SQuAD 41.7 (30B tokens)", enc_length=1024
    ),
    based.released(
        "jrt_rnn_1b", "JRT-1B-50B", "FDA 86.7, SWDE 49.4, NQ 38.3, SQuAD 50.4 (50B tokens)", enc_length=1024
    ),
)
