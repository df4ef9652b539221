"""Mamba: a language model of nothing but selective SSM blocks, and the presets of its paper.

    x <- x + Mamba(RMSNorm(x)) for every layer;   logits = W_head RMSNorm(x), W_head tied to the embedding

The mixer and its equations are in layers/mixers/mamba.py, the residual container in ssmzoo/layers/stack.py. Layers
listed in `attn_layer_idx` carry multi-head attention instead of the SSM; `d_intermediate` adds a gated MLP per block.
Paper and code differ in B: the paper's formula discretises it exactly (ZOH), the code and we use dt B.
Source: Gu & Dao 2023 (arXiv 2312.00752); state-spaces/mamba models/mixer_seq_simple.py (Apache-2.0) for names, the
initialisation and the checkpoints; Hugging Face transformers models/mamba (Apache-2.0) for the second naming.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.embed import padded_vocab_size
from ssmzoo.layers.heads import CausalLM
from ssmzoo.layers.init import scaled_output_
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mha import MHA
from ssmzoo.layers.stack import Stack
from ssmzoo.layers.state import ModelOutput


class MambaLM(CausalLM):
    """ids (b l) -> ModelOutput(logits (b l v), state, {}); the defaults are the paper's 130M model.

    vocab_size, pad_vocab_size_multiple   v is vocab_size rounded up to a multiple
    d_model, n_layer      width and number of blocks
    d_intermediate        hidden width of a gated MLP in every block (rounded up to 128); 0: none
    ssm_cfg               arguments of the mixer (ssmzoo.layers.mixers.mamba.Mamba), e.g. {"d_state": 32}
    attn_layer_idx, attn_cfg              layers that carry attention, and the arguments of ssmzoo.layers.mixers.mha.MHA
    rms_norm, norm_eps    RMSNorm, or LayerNorm
    residual_in_fp32      keep the residual stream in fp32 when the model computes in lower precision
    tie_embeddings        the head's weight is the embedding's
    """

    mixer = Mamba

    def __init__(
        self,
        vocab_size: int = 50277,
        d_model: int = 768,
        n_layer: int = 24,
        d_intermediate: int = 0,
        ssm_cfg: Mapping[str, Any] | None = None,
        attn_layer_idx: Sequence[int] = (),
        attn_cfg: Mapping[str, Any] | None = None,
        rms_norm: bool = True,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        tie_embeddings: bool = True,
        pad_vocab_size_multiple: int = 8,
    ):
        if d_model < 1 or n_layer < 1 or d_intermediate < 0:
            raise ValueError(
                f"need d_model and n_layer >= 1 and d_intermediate >= 0, got d_model={d_model}, "
                f"n_layer={n_layer}, d_intermediate={d_intermediate}"
            )
        attention = set(attn_layer_idx)
        if not attention <= set(range(n_layer)) or (attention and not attn_cfg):
            raise ValueError(
                f"attn_layer_idx={list(attn_layer_idx)} must lie in 0..{n_layer - 1} and needs attn_cfg "
                f"with at least num_heads, got attn_cfg={attn_cfg}"
            )
        mixers = (
            MHA(d_model, **attn_cfg) if i in attention else self.mixer(d_model, **(ssm_cfg or {}))
            for i in range(n_layer)
        )
        rows = padded_vocab_size(vocab_size, pad_vocab_size_multiple)
        super().__init__(
            Stack(rows, d_model, mixers, d_intermediate, rms_norm, norm_eps, residual_in_fp32), tie_embeddings
        )
        self.vocab_size = vocab_size
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """embedding               N(0, 0.02)
        out_proj, fc2           torch's Linear default / sqrt(n_layer)
        biases of projections   0 (dt_proj's is part of the time step and stays)
        all else                the mixers' own; torch's default for what they leave open; norms 1
        """
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for name, module in self.backbone.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in ("out_proj", "fc2"):
                scaled_output_(module.weight, len(self.backbone.layers))
            if isinstance(module, nn.Linear) and module.bias is not None and leaf != "dt_proj":
                nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- released checkpoints

INERT = {"use_fast_path", "use_mem_eff_path", "layer_idx", "device", "dtype"}  # which kernel, where: same results


def official_mamba(
    state: dict,
    d_model: int = 2560,
    n_layer: int = 64,
    d_intermediate: int = 0,
    vocab_size: int = 50277,
    ssm_cfg: dict | None = None,
    attn_layer_idx: Sequence[int] | None = None,
    attn_cfg: dict | None = None,
    rms_norm: bool = True,
    residual_in_fp32: bool = True,
    fused_add_norm: bool = True,
    pad_vocab_size_multiple: int = 8,
    tie_embeddings: bool = True,
    d_state: int = 16,
    d_conv: int = 4,
    expand: float = 2,
    dt_rank: int | str = "auto",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: str = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
    conv_bias: bool = True,
    bias: bool = False,
    use_fast_path: bool = True,
    layer_idx: int | None = None,
):
    """mamba_ssm's MambaLMHeadModel (first two lines: MambaConfig), or, for a checkpoint without a backbone, its Mamba
    block. fused_add_norm, use_fast_path and layer_idx choose kernels and caches; the results are the same."""
    if "A_log" in state:
        block = OfficialMamba(
            d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias
        )
        return block, state
    return official_lm(
        MambaLM,
        "Mamba1",
        state,
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
    )


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


class OfficialMamba(StepByStep, Mamba):
    """The mixer with the inputs and outputs of mamba_ssm's."""


def official_mamba_hf(
    state: dict,
    vocab_size: int = 50280,
    hidden_size: int = 768,
    state_size: int = 16,
    num_hidden_layers: int = 32,
    layer_norm_epsilon: float = 1e-5,
    expand: float = 2,
    conv_kernel: int = 4,
    use_bias: bool = False,
    use_conv_bias: bool = True,
    hidden_act: str = "silu",
    residual_in_fp32: bool = True,
    time_step_rank: int | str = "auto",
    intermediate_size: int | None = None,
    tie_word_embeddings: bool = True,
    time_step_scale: float = 1.0,
    time_step_min: float = 0.001,
    time_step_max: float = 0.1,
    time_step_init_scheme: str = "random",
    time_step_floor: float = 1e-4,
    initializer_range: float = 0.1,
    rescale_prenorm_residual: bool = False,
    use_cache: bool = True,
    use_mambapy: bool = False,
    use_associative_scan: bool = True,
    pad_token_id: int | None = 0,
    bos_token_id: int | None = 0,
    eos_token_id: int | list | None = 0,
):
    """transformers' MambaForCausalLM; the arguments are MambaConfig's. Those of the last three lines have no part in
    what a trained checkpoint computes."""
    if intermediate_size is not None:
        expand = intermediate_size / hidden_size
    mixer = {
        "d_state": state_size,
        "d_conv": conv_kernel,
        "expand": expand,
        "dt_rank": time_step_rank,
        "bias": use_bias,
        "conv_bias": use_conv_bias,
        "dt_scale": time_step_scale,
        "dt_min": time_step_min,
        "dt_max": time_step_max,
        "dt_init": time_step_init_scheme,
        "dt_init_floor": time_step_floor,
    }
    return official_hf_lm(
        MambaHF,
        state,
        vocab_size,
        hidden_size,
        num_hidden_layers,
        mixer,
        layer_norm_epsilon,
        hidden_act,
        residual_in_fp32,
        tie_word_embeddings,
    )


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
    state = {key.replace("backbone.embeddings.", "backbone.embedding."): value for key, value in state.items()}
    return model, with_head(state, tie_word_embeddings)


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


class MambaHF(AttentionMask, MambaLM):
    """Mamba with the inputs of transformers' MambaForCausalLM."""


# ---------------------------------------------------------------- golden cases of language models


def greedy(model, ids: Tensor, new_tokens: int, mask: Tensor | None = None) -> Tensor:
    """Prompt and its most likely continuation, ids (b l) -> (b l + new_tokens); model(ids, state=, mask=)."""
    out = model(ids, state=None, mask=mask)
    for _ in range(new_tokens - 1):
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        out = model(ids[:, -1:], state=out.state, mask=None)
    return torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)


def golden_lm(case) -> dict[str, Tensor]:
    """logits, mean next-token loss in nats over the whole (padded) vocabulary, greedy continuation."""
    from ssmzoo.official import find_hook

    module, state = find_hook("official", case.family)(dict(case.params), **case.official_kwargs)
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


def golden_mamba(case) -> dict[str, Tensor]:
    return golden_lm(case) if "n_layer" in case.official_kwargs else case.run_official()


def golden_mamba_hf(case) -> dict[str, Tensor]:
    return golden_lm(case)
