"""Cheems as released by LoserCheems/WonderfulMatrices (Apache-2.0): CheemsForCausalLM by the fields of its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.models.cheems import CheemsLM
from ssmzoo.released.arguments import INITIAL, KERNEL, Arguments
from ssmzoo.released.fit import same_head
from ssmzoo.released.infer import count
from ssmzoo.released.names import Names

MODELS = (CheemsLM,)
TELLING_KEYS = (r"pre_sequence_layernorm\.weight", r"post_state_residual\.weight")
NAMES = Names(("model.word_embed.{p}", "embedding.{p}"), ("lm_head.{p}", "head.{p}"), ("model.{rest}", "{rest}"))
OTHER = "our model has no such part"
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048}
CHEEMS = Arguments(
    "CheemsForCausalLM",
    {
        **{"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 32},
        **{"hidden_bias": False, "hidden_dropout": 0.0, "tie_word_embeddings": True, "num_attention_heads": 8},
        **{"num_key_value_heads": None, "dynamic_mask_ratio": 0.0, "attn_layer_period": 8, "attn_layer_offset": 7},
        **{"is_moe": False, "num_cdmoe_experts": 16348, "num_cdmoe_heads": 4, "num_cdmoe_experts_per_head": 8},
        **{"expert_retrieval_size": 64, "rope_theta": 10000.0, "max_position_embeddings": 2048},
        **{"pad_token_id": 2, "rope_scaling": DYNAMIC},
    },
    {
        **{"ssd_chunk_size": (256, KERNEL), "initializer_range": (0.02, INITIAL)},
        **{"bos_token_id": (0, "the tokenizer's"), "eos_token_id": (1, "the tokenizer's")},
        **{"use_cache": (True, "states are always returned"), "attention_dropout": (0.0, "acts in training only")},
    },
    {
        "hidden_act": ("silu", OTHER),
        "rms_norm_eps": (1e-6, OTHER),
    },
)
TABLES = (CHEEMS,)


def official(state: dict[str, Tensor], **given):
    """CheemsForCausalLM; outputs: logits. Its A is the parameter itself and its mask looks at all keys."""
    c = CHEEMS.complete(given)
    period, offset, n = c["attn_layer_period"], c["attn_layer_offset"], c["num_hidden_layers"]
    tied = c["tie_word_embeddings"] and same_head(state, "lm_head.weight", "model.word_embed.weight")
    model = OfficialCheems(
        c["vocab_size"],
        c["hidden_size"],
        n,
        c["num_attention_heads"],
        c["intermediate_size"],
        "".join("A" if i % period == offset else "S" for i in range(n)),
        c["num_key_value_heads"],
        "raw",
        c["dynamic_mask_ratio"],
        "all",
        c["num_cdmoe_experts"] if c["is_moe"] else 0,
        c["num_cdmoe_heads"],
        c["num_cdmoe_experts_per_head"],
        c["expert_retrieval_size"],
        c["rope_theta"],
        c["hidden_bias"],
        c["hidden_dropout"],
        tied,
    )
    model.stretch = stretch(c["rope_scaling"], c["max_position_embeddings"])
    if c["pad_token_id"] is not None:
        model.embedding.padding_idx = c["pad_token_id"]  # its row gets no gradient from the embedding
    return model, from_official(model, state)


def stretch(scaling: Mapping[str, Any] | None, length: int) -> tuple[float, int] | None:
    """(factor, length of training) of dynamic rotary positions, None for plain ones; ValueError for other kinds."""
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if kind not in ("default", "dynamic"):
        raise ValueError(f"rope_scaling is of kind {kind!r}; dynamic and default (plain) rotary positions are here")
    return (float(scaling["factor"]), length) if kind == "dynamic" else None


def from_official(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their keys hold both halves in one tensor (heads, n, 2, half); a tied head may be missing. A model of ours that
    holds A_log takes the logarithm of a negative A."""
    ours, own = {}, model.state_dict().keys()
    for key, value in NAMES.to_ours(state).items():
        if key.endswith("feed_forward.keys"):
            ours |= {f"{key}.keys1": value[:, :, 0], f"{key}.keys2": value[:, :, 1]}
        elif f"{key}_log" in own and bool((value < 0).all()):
            ours[f"{key}_log"] = torch.log(-value)
        else:
            ours[key] = value
    tied = model.head.weight is model.embedding.weight
    return ours | ({"head.weight": ours["embedding.weight"]} if tied else {})


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their names, without a tied head. A negative A = -exp(A_log) is written as the A that it is."""
    tied, theirs = module.head.weight is module.embedding.weight, {}
    for key, value in state.items():
        if key.endswith(".keys1"):
            theirs[key.removesuffix(".keys1")] = torch.stack([value, state[f"{key[:-1]}2"]], dim=2)
        elif key.endswith(".A_log"):
            theirs[key.removesuffix("_log")] = -value.exp()
        elif not (key.endswith(".keys2") or tied and key == "head.weight"):
            theirs[key] = value
    return NAMES.to_theirs(theirs)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes; only how many experts are taken and which keys are hidden have no weights."""
    at = "model.layers."
    inferred: dict[str, Any] = {"num_hidden_layers": count(state, f"{at}#.")}
    inferred["vocab_size"], inferred["hidden_size"] = state["model.word_embed.weight"].shape
    inferred["intermediate_size"] = len(state[f"{at}0.feed_forward.up_proj.weight"])
    inferred["hidden_bias"] = f"{at}0.feed_forward.up_proj.bias" in state
    attention = [i for i in range(inferred["num_hidden_layers"]) if f"{at}{i}.attn.A" in state]
    inferred["num_attention_heads"] = len(next(v for k, v in state.items() if k.endswith((".attn.A", ".ssd.A"))))
    if attention:
        heads, width = state[f"{at}{attention[0]}.attn.dt_proj.weight"].shape
        inferred["num_key_value_heads"] = width * heads // inferred["hidden_size"]
    period = attention[1] - attention[0] if len(attention) > 1 else inferred["num_hidden_layers"]
    inferred |= {"attn_layer_period": period, "attn_layer_offset": attention[0] if attention else period}
    keys = state.get(f"{at}0.feed_forward.keys")
    inferred["is_moe"] = keys is not None
    if keys is not None:
        inferred |= {"num_cdmoe_experts": keys.shape[1] ** 2, "num_cdmoe_heads": len(keys)}
        inferred["expert_retrieval_size"] = 2 * keys.shape[-1]
    return inferred


class OfficialCheems(CheemsLM):
    """forward(input_ids) -> logits.

    Sequences longer than those of training turn more slowly where `stretch` = (factor s, length n) says so: with p
    channels of a head the base is multiplied by (s l / n - (s - 1))^(p / (p - 2)), as transformers does it.
    """

    stretch: tuple[float, int] | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.stretch is None or input_ids.shape[1] <= self.stretch[1]:
            return super().forward(input_ids).logits
        factor, length = self.stretch
        grown = factor * input_ids.shape[1] / length - (factor - 1)
        turning = [module for module in self.modules() if hasattr(module, "rope_base")]
        before = [module.rope_base for module in turning]
        try:
            for module in turning:
                module.rope_base *= grown ** (module.d_head / (module.d_head - 2))
            return super().forward(input_ids).logits
        finally:
            for module, base in zip(turning, before):
                module.rope_base = base
