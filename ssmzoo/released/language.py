"""What the released language models share: MambaConfig's fields, the calls of the official blocks, golden cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.state import ModelOutput
from ssmzoo.released.arguments import DEVICE, INITIAL, KERNEL, Arguments
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.fit import same_head
from ssmzoo.released.infer import count, part
from ssmzoo.released.names import Names, add_prefix, cut_prefix

HF = Names(("backbone.embeddings.{p}", "backbone.embedding.{p}"))
MODEL = {"ssm_cfg": None, "attn_layer_idx": None, "attn_cfg": None}
LM = Arguments(  # the class itself takes a MambaConfig; these are its fields
    "MambaLMHeadModel",
    {"d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277}
    | MODEL
    | {"rms_norm": True, "residual_in_fp32": True, "pad_vocab_size_multiple": 8, "tie_embeddings": None},
    {"fused_add_norm": (True, KERNEL), "initializer_cfg": (None, "sets initial values"), **DEVICE},
)
BACKBONE = Arguments(
    "MixerModel",
    MODEL | {"norm_epsilon": 1e-5, "rms_norm": False, "residual_in_fp32": False},
    {"fused_add_norm": (False, KERNEL), "initializer_cfg": (None, "sets initial values"), **DEVICE},
    required=("d_model", "n_layer", "d_intermediate", "vocab_size"),
)
IN_BLOCKS = {  # arguments of every block of theirs that change none of its values
    **{"dt_min": (0.001, INITIAL), "dt_max": (0.1, INITIAL), "dt_init_floor": (1e-4, INITIAL)},
    **{"layer_idx": (None, "names the block in a cache"), **DEVICE},
}
INERT = {"use_fast_path", "use_mem_eff_path", "layer_idx", "device", "dtype", "process_group", "sequence_parallel"}


def official_lm(cls, layer: str, state: dict, given: dict) -> tuple[nn.Module, dict]:
    """MambaConfig's fields -> (our language model, state under our names), for any of the mixers. A file without the
    prefix `backbone.` is the backbone alone: its outputs are the hidden states."""
    alone = "embedding.weight" in state
    config = (BACKBONE if alone else LM).complete(given)
    ssm_cfg, attn_cfg = dict(config["ssm_cfg"] or {}), dict(config["attn_cfg"] or {})
    found = ssm_cfg.pop("layer", layer)
    if found != layer:
        raise ValueError(f"ssm_cfg.layer is {found!r}: load this checkpoint with family {found.lower().rstrip('1')!r}")
    if config["attn_layer_idx"] and (
        not attn_cfg.pop("causal", False) or attn_cfg.pop("rotary_emb_interleaved", False)
    ):
        raise ValueError(
            "attn_cfg: only causal attention with rotary halves (not interleaved) exists in a causal "
            "language model; set causal=True and rotary_emb_interleaved=False"
        )
    state = add_prefix("backbone.", state) if alone else state
    tied = alone or is_tied(state, config["tie_embeddings"], "tie_embeddings", True)
    model = cls(
        config["vocab_size"],
        config["d_model"],
        config["n_layer"],
        config["d_intermediate"],
        {k: v for k, v in ssm_cfg.items() if k not in INERT},
        config["attn_layer_idx"] or (),
        {k: v for k, v in attn_cfg.items() if k not in INERT} if config["attn_layer_idx"] else None,
        config["rms_norm"],
        config.get("norm_epsilon", 1e-5),
        residual_in_fp32=config["residual_in_fp32"],
        tie_embeddings=tied,
        pad_vocab_size_multiple=config.get("pad_vocab_size_multiple", 1),
    )
    return (HiddenStates(model), state) if alone else (model, with_head(state, tied))


def is_tied(state: dict, asked: bool | None, argument: str, default: bool) -> bool:
    """Is the head the embedding? The file decides; `argument` may say so too, but not the contrary.

    A file without a head has a tied one where that is the class's default or asked for.
    """
    if "lm_head.weight" not in state:
        return default if asked is None else asked
    same = same_head(state, "lm_head.weight", "backbone.embedding.weight")
    if asked and not same:
        raise CheckpointError(
            f"{argument} is True, but lm_head.weight of the file is not its embedding; with {argument}=False both load"
        )
    return same and (default if asked is None else asked)


def with_head(state: dict, tied: bool) -> dict:
    """A tied head is stored twice, or once: here it is always the embedding itself."""
    return {**state, "lm_head.weight": state["backbone.embedding.weight"]} if tied else state


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mamba_ssm's names; those of a backbone alone have no prefix there."""
    return cut_prefix("backbone.", state) if isinstance(module, HiddenStates) else dict(state)


def from_official(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of mamba_ssm or transformers, with or without head and `backbone.` -> those of a language model of ours."""
    if "embedding.weight" in state or "embeddings.weight" in state:
        state = add_prefix("backbone.", state)
    state = HF.to_ours(state)
    tied = model.lm_head.weight is model.backbone.embedding.weight
    return with_head(state, tied and same_head(state, "lm_head.weight", "backbone.embedding.weight"))


def infer_lm(state: dict[str, Tensor], mixer) -> dict[str, Any]:
    """MambaConfig's fields that the tensors tell; `mixer(state of one mixer, d_model)` tells ssm_cfg."""
    at = "backbone." if "backbone.embedding.weight" in state else ""
    if f"{at}embedding.weight" not in state:
        return {}
    rows, d = state[f"{at}embedding.weight"].shape
    layers = range(count(state, f"{at}layers.#."))
    attention = [i for i in layers if f"{at}layers.{i}.mixer.A_log" not in state and not _ssm(state, at, i)]
    mixers = [i for i in layers if i not in attention]
    inferred: dict[str, Any] = {"d_model": d, "n_layer": len(layers), "vocab_size": rows, "attn_layer_idx": attention}
    hidden = state.get(f"{at}layers.0.mlp.fc2.weight")
    inferred |= {
        "d_intermediate": 0 if hidden is None else hidden.shape[1],
        "rms_norm": f"{at}norm_f.bias" not in state,
    }
    if at and rows % LM.default("pad_vocab_size_multiple"):
        inferred["pad_vocab_size_multiple"] = 1
    if mixers:
        inferred["ssm_cfg"] = mixer(part(state, f"{at}layers.{mixers[0]}.mixer."), d)
    return inferred


def _ssm(state: dict, at: str, i: int) -> bool:
    return f"{at}layers.{i}.mixer.dt_bias" in state


class HiddenStates(nn.Module):
    """The backbone of a language model: ids (b l) -> hidden states after the last norm (b l d)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.backbone = model.backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.bool()
        return self.backbone(input_ids, None, mask=mask)[0]


class StepByStep:
    """An official block: forward(x) -> y; forward(x, x_next) -> y, the caches after x, the outputs for x_next decoded
    token by token, the caches after it."""

    def forward(self, x: Tensor, x_next: Tensor | None = None):
        y, state = super().forward(x)
        if x_next is None:
            return y
        after_x, steps = state, []
        for token in x_next.split(1, dim=1):
            step, state = super().forward(token, state)
            steps.append(step)
        return y, *after_x, torch.cat(steps, dim=1), *state


class AttentionMask:
    """The inputs of transformers' classes: forward(input_ids, attention_mask), 1 for real tokens. A tuple in second
    position is the state to continue from, as in every model of the zoo."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | tuple | None = None,
        *,
        state: tuple | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        prefix: int | Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> ModelOutput:
        if isinstance(attention_mask, tuple):
            attention_mask, state = None, attention_mask
        if attention_mask is not None:
            mask = attention_mask.bool()
        more = dict(mask=mask, seq_idx=seq_idx, prefix=prefix, logits_to_keep=logits_to_keep)
        return super().forward(input_ids, state, **more)


def golden_lm(case) -> dict[str, Tensor]:
    """logits, mean next-token loss in nats over the whole (padded) vocabulary, greedy continuation; of a block or a
    backbone alone its own outputs."""
    if "logits" not in case.outputs:
        return case.run_official()
    module, state = case.build()
    ids, mask = case.inputs["input_ids"], case.inputs.get("attention_mask")
    mask = None if mask is None else mask.bool()

    def model(ids, **kwargs):
        return torch.func.functional_call(module.eval(), state, (ids,), kwargs)

    logits = model(ids, mask=mask).logits
    result = {"logits": logits, "loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())}
    if "generated" in case.outputs:
        with torch.no_grad():
            result["generated"] = greedy(model, ids, case.outputs["generated"].shape[1] - ids.shape[1], mask)
    return result


def greedy(model, ids: Tensor, new_tokens: int, mask: Tensor | None = None) -> Tensor:
    """Prompt and its most likely continuation, ids (b l) -> (b l + new_tokens); model(ids, state=, mask=)."""
    out = model(ids, state=None, mask=mask)
    for _ in range(new_tokens - 1):
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        out = model(ids[:, -1:], state=out.state, mask=None)
    return torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
