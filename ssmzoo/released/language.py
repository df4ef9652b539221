"""What the released language models share: MambaConfig's fields, the calls of the official blocks, golden cases."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.state import ModelOutput
from ssmzoo.released.family import find
from ssmzoo.released.names import Names

HF = Names(("backbone.embeddings.{p}", "backbone.embedding.{p}"))
INERT = {"use_fast_path", "use_mem_eff_path", "layer_idx", "device", "dtype"}  # which kernel, where: same results


def official_lm(
    cls,
    layer: str,
    state: dict,
    d_model,
    n_layer,
    d_intermediate,
    vocab_size,
    ssm_cfg,
    attn_layer_idx,
    attn_cfg,
    rms_norm,
    residual_in_fp32,
    pad_vocab_size_multiple,
    tie_embeddings,
):
    """MambaConfig's fields -> (our language model, state under our names), for any of the three mixers."""
    ssm_cfg, attn_cfg = dict(ssm_cfg or {}), dict(attn_cfg or {})
    found = ssm_cfg.pop("layer", layer)
    if found != layer:
        raise ValueError(f"ssm_cfg.layer is {found!r}: load this checkpoint with family {found.lower().rstrip('1')!r}")
    if attn_layer_idx and (not attn_cfg.pop("causal", False) or attn_cfg.pop("rotary_emb_interleaved", False)):
        raise ValueError(
            "attn_cfg: only causal attention with rotary halves (not interleaved) exists in a causal "
            "language model; set causal=True and rotary_emb_interleaved=False"
        )
    ssm_cfg, attn_cfg = ({k: v for k, v in cfg.items() if k not in INERT} for cfg in (ssm_cfg, attn_cfg))
    model = cls(
        vocab_size,
        d_model,
        n_layer,
        d_intermediate,
        ssm_cfg,
        attn_layer_idx or (),
        attn_cfg,
        rms_norm,
        residual_in_fp32=residual_in_fp32,
        tie_embeddings=tie_embeddings,
        pad_vocab_size_multiple=pad_vocab_size_multiple,
    )
    return model, with_head(state, tie_embeddings)


def with_head(state: dict, tied: bool) -> dict:
    """A tied head is stored twice, or once: here it is always the embedding itself."""
    return {**state, "lm_head.weight": state["backbone.embedding.weight"]} if tied else state


def official_hf_lm(
    cls,
    state: dict,
    vocab_size,
    hidden_size,
    num_hidden_layers,
    mixer: dict,
    layer_norm_epsilon,
    hidden_act,
    residual_in_fp32,
    tie_word_embeddings,
):
    """The fields that transformers' two Mamba configs share -> (our language model, state under our names)."""
    if hidden_act != "silu":
        raise ValueError(f"hidden_act must be 'silu', as in all released checkpoints; got {hidden_act!r}")
    model = cls(
        vocab_size,
        hidden_size,
        num_hidden_layers,
        ssm_cfg=mixer,
        norm_eps=layer_norm_epsilon,
        residual_in_fp32=residual_in_fp32,
        tie_embeddings=tie_word_embeddings,
        pad_vocab_size_multiple=1,
    )
    return model, with_head(HF.to_ours(state), tie_word_embeddings)


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
    """The inputs of transformers' classes: forward(input_ids, attention_mask), 1 for real tokens. A tuple in the second
    place is the state to continue from, as in every model of the zoo."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | tuple | None = None,
        *,
        state: tuple | None = None,
        mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> ModelOutput:
        if isinstance(attention_mask, tuple):
            attention_mask, state = None, attention_mask
        if attention_mask is not None:
            mask = attention_mask.bool()
        return super().forward(input_ids, state, mask=mask, seq_idx=seq_idx)


def golden_lm(case) -> dict[str, Tensor]:
    """logits, mean next-token loss in nats over the whole (padded) vocabulary, greedy continuation."""
    module, state = find(case.family, "official")(dict(case.params), **case.official_kwargs)
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


def to_hf(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names; a head that is the embedding is not written there."""
    tied = module.lm_head.weight is module.backbone.embedding.weight
    return HF.to_theirs({key: value for key, value in state.items() if not (tied and key == "lm_head.weight")})
