"""The configuration of a Mamba language model as other programs write it, read from the model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ssmzoo.inference.export.source import Source, family_of_class
from ssmzoo.layers.decoder import padded_vocab_size
from ssmzoo.layers.mixers.attention import MHA
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.mamba3 import Mamba3
from ssmzoo.released.family import find, to_official

LAYERS = {"mamba": "Mamba1", "mamba2": "Mamba2", "mamba3": "Mamba3"}  # family: what mamba_ssm calls its mixer


def why_no_mamba(source: Source, attribute: str = "official") -> str | None:
    """Why a model is none of the Mambas that are one class with several mixers."""
    if not isinstance(source.model, MambaLM) or family_of_class(source.cls, attribute) is None:
        return "only Mamba, Mamba-2 and their kin have it"
    return None


def is_tied(model: MambaLM) -> bool:
    return model.lm_head.weight is model.backbone.embedding.weight


def mixers(model: MambaLM, kind: type | None = None) -> list[nn.Module]:
    """The mixers of a kind, or those that are no attention."""
    found = [block.mixer for block in model.backbone.layers]
    return [m for m in found if (isinstance(m, kind) if kind else not isinstance(m, MHA))]


def norm_eps(model: MambaLM) -> float:
    return model.backbone.norm_f.eps


def known(source: Source, family: str) -> dict[str, Any]:
    """What the tensors tell about the constructor of a family, with the sizes of which they tell only the product."""
    model = source.model
    first = next(iter(mixers(model)), None)
    known = {"d_state": getattr(first, "d_state", None), "ngroups": getattr(first, "ngroups", None)}
    given: Mapping[str, Any] = {"ssm_cfg": known, "state_size": known["d_state"], "n_groups": known["ngroups"]}
    return find(family, "infer")(to_official(family, model), given)


def ssm_cfg(mixer: nn.Module) -> dict[str, Any]:
    """What a mixer's tensors do not tell."""
    if isinstance(mixer, Mamba2):
        more = {"norm_before_gate": mixer.options.norm_before_gate} if mixer.norm is not None else {}
        return {"dt_limit": list(mixer.dt_limit), "chunk_size": mixer.chunk_size} | more
    if isinstance(mixer, Mamba3):
        return {"A_floor": mixer.A_floor, "chunk_size": mixer.chunk_size}
    return {}


def attn_cfg(mixer: MHA) -> dict[str, Any]:
    """Arguments of mamba_ssm's MHA."""
    return {
        "causal": True,
        "num_heads": mixer.num_heads,
        "num_heads_kv": mixer.num_heads_kv,
        "head_dim": mixer.head_dim,
        "mlp_dim": mixer.mlp_dim,
        "qkv_proj_bias": mixer.in_proj.bias is not None,
        "out_proj_bias": mixer.out_proj.bias is not None,
        "softmax_scale": mixer.rope["scale"],
        "d_conv": mixer.d_conv,
        "rotary_emb_dim": mixer.rope["rope_dim"],
        "rotary_emb_base": mixer.rope["rope_base"],
    }


def mamba_ssm_config(source: Source) -> dict[str, Any]:
    """The fields of MambaConfig."""
    model, family = source.model, family_of_class(source.cls)
    fields = known(source, family)
    rows, vocab = len(model.lm_head.weight), model.vocab_size
    multiple = next((m for m in (8, 16, 64, 128, 1) if padded_vocab_size(vocab, m) == rows), None)
    attention = mixers(model, MHA)
    return {
        **{key: fields[key] for key in ("d_model", "d_intermediate", "n_layer")},
        "vocab_size": rows if multiple is None else vocab,
        "ssm_cfg": {"layer": LAYERS[family], **fields.get("ssm_cfg", {}), **ssm_cfg(mixers(model)[0])},
        "attn_layer_idx": fields["attn_layer_idx"],
        "attn_cfg": attn_cfg(attention[0]) if attention else {},
        "rms_norm": fields["rms_norm"],
        "residual_in_fp32": model.backbone.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": multiple or 1,
        "tie_embeddings": is_tied(model),
    }


def why_not_transformers(model: MambaLM) -> str | None:
    """What transformers' Mambas do not have."""
    if not isinstance(model.backbone.norm_f, RMSNorm):
        return "transformers' Mambas have RMSNorm only, this model has LayerNorm"
    if mixers(model, MHA):
        return "transformers' Mambas have no attention layers"
    if any(block.mlp is not None for block in model.backbone.layers):
        return "transformers' Mambas have no gated MLP (d_intermediate)"
    if (first := mixers(model)[0]).d_inner % first.d_model:
        return f"transformers' expand is a whole number, this model's {first.d_inner / first.d_model:.4g}"
    for mixer in mixers(model, Mamba2):
        o = mixer.options
        if mixer.norm is None or o.norm_before_gate or o.D_has_hdim or o.learnable_init_states or mixer.d_mlp:
            return "transformers' Mamba-2 has an output norm behind the gate, one D per head, and d_ssm = d_inner"
        if o.norm_groups not in (None, mixer.ngroups) or o.norm_eps != norm_eps(model):
            return "transformers' Mamba-2 has one epsilon for all norms and as many groups in the norm as in B and C"
    return None


def transformers_config(source: Source) -> dict[str, Any]:
    """config.json of MambaForCausalLM, Mamba2ForCausalLM or FalconMambaForCausalLM.

    For serving engines Mamba-2 also has intermediate_size and rms_norm, which transformers does not read.
    """
    model, family = source.model, family_of_class(source.cls, "MODEL_TYPE")
    first, table = mixers(model)[0], find(family, "TABLES")[0]
    fields = {name: table.default(name) for name in table.honoured if name not in ("clamp_steps", "n_groups")}
    fields |= known(source, family)
    if isinstance(first, Mamba2):
        low, high = first.dt_limit
        fields.pop("time_step_limit")
        if (low, high) != (0.0, float("inf")):
            fields["time_step_limit"] = [low, min(high, 1e30)]  # JSON has no infinity
        fields |= {"n_groups": first.ngroups, "chunk_size": first.chunk_size}
        fields |= {"intermediate_size": first.d_inner, "rms_norm": True}
    elif family == "falcon_mamba":
        fields["mixer_rms_eps"] = first.x_proj.eps
    return {
        "architectures": [table.cls],
        "model_type": find(family, "MODEL_TYPE"),
        "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        **fields,
        "expand": first.d_inner // first.d_model,
        "layer_norm_epsilon": norm_eps(model),
        "residual_in_fp32": model.backbone.residual_in_fp32,
        "tie_word_embeddings": is_tied(model),
    }
