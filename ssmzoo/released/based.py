"""Based as released by HazyResearch/based (Apache-2.0): GPTLMHeadModel and its three mixers.

Files of the hub put `model.` before every name and may hold counters of metrics, which are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.layers.mixers.sliding_attention import SlidingAttention
from ssmzoo.models.based import BasedLM, GatedConv, TaylorAttention
from ssmzoo.released.arguments import DEVICE, INITIAL, KERNEL, RECOMPUTE, Arguments
from ssmzoo.released.catalogue import Hub, Weights
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.names import Names

MODELS = (BasedLM,)
TELLING_KEYS = (r"transformer\.embeddings\.word_embeddings\.weight", r"mixer\.proj_q\.weight")
YIELDS_TO = ("jrt_rnn",)
NAMES = Names(
    ("transformer.embeddings.word_embeddings.{p}", "backbone.embedding.{p}"),
    ("transformer.embeddings.position_embeddings.{p}", "positions.table.{p}"),
    ("transformer.layers.{i}.mixer.conv.conv.{p}", "backbone.layers.{i}.mixer.conv.{p}"),
    ("transformer.layers.{i}.mixer.conv1.conv.{p}", "backbone.layers.{i}.mixer.conv.{p}"),
    ("transformer.layers.{rest}", "backbone.layers.{rest}"),
    ("transformer.ln_f.{p}", "backbone.ln_f.{p}"),
)
TRAINING = "acts in training only"
NO_SUCH_MLP = "our model has no such part"
NAMED = "names the class"
PLACED = {"_target_": (None, NAMED), "layer_idx": (None, "names the block in a cache")}
SIZED = {"d_model": None, "embed_dim": None}  # one of the two names of the width
LENGTH = {"l_max": (None, "the longest sequence, of which nothing depends"), **PLACED}
CONV = Arguments(
    "BaseConv",
    {"use_bias": True, "expand_proj": 2, "kernel_size": 3, **SIZED},
    {"kernel_sizes": (3, "swallowed there: kernel_size counts"), **LENGTH},
    {"use_cuda": (False, "the fused convolution there has a bias, which this one lacks")},
)
TAYLOR = {"feature_dim": 16, "num_heads": 16, "eps": 1e-12, **SIZED}
LINEAR = Arguments(
    "LinearAttention",
    TAYLOR | {"feature_map": None},
    {"parallel_implementation": ("quadratic", KERNEL), **LENGTH},
    {
        "feature_dim_v": (None, "values have the width of a head"),
        "head_dim": (None, "the heads here share d_model evenly"),
        "use_decay_proj": (False, "no decay that depends on the input exists here"),
    },
)
SLIDING = Arguments(
    "SlidingAttention",
    {"window_size": 128, "rotary_emb_dim": 0, "qkv_proj_bias": True, "out_proj_bias": True} | SIZED,
    {
        **{"dropout": (0.0, TRAINING), "causal": (True, "overruled there: it is always causal")},
        **{"fused_bias_fc": (False, KERNEL), "use_flash_attn": (True, KERNEL), "checkpointing": RECOMPUTE},
        **{"use_mask": (True, "kept and not read there"), "inference_bs": (1, "sizes a cache")},
        **{"inference_mode": ("default", KERNEL), **DEVICE, **LENGTH},
    },
    {
        "num_heads_kv": (None, "every head here has keys of its own"),
        "cross_attn": (False, "only self-attention exists here"),
        "softmax_scale": (None, "the scale is 1/sqrt(width of a head) here"),
        "rotary_emb_base": (10000.0, "the base of the released models"),
        "rotary_emb_scale_base": (None, "rotary positions are not scaled here"),
        "rotary_emb_interleaved": (False, "the halves of a head are paired here"),
        "return_residual": (False, "the input is not handed back here"),
    },
    required=("num_heads",),
)
LM_HONOURED = {  # None: the tensors tell
    **{"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_inner": None, "rms_norm": None},
    **{"pad_vocab_size_multiple": 1, "layer_norm_epsilon": 1e-5, "residual_in_fp32": False, "n_positions": None},
    **{"alt_mixer_layers": None, "alt_mixer_2_layers": None, "mixer": None, "alt_mixer": None, "alt_mixer_2": None},
    **{"activation_function": "gelu_new", "mlp_fc1_bias": None, "mlp_fc2_bias": None},
    **{"qkv_proj_bias": None, "out_proj_bias": None, "rotary_emb_fraction": 0.0},  # of the sliding windows
}
LM_INERT = {
    **{"use_flash_attn": (False, KERNEL), "fused_mlp": (False, KERNEL), "fused_bias_fc": (False, KERNEL)},
    **{"fused_dropout_add_ln": (False, KERNEL), "special_initializer": (False, INITIAL)},
    **{"use_weight_init": (True, INITIAL), "initializer_range": (0.02, INITIAL)},
    **{"embd_pdrop": (0.1, TRAINING), "attn_pdrop": (0.1, TRAINING), "resid_pdrop": (0.1, TRAINING)},
    **{"max_position_embeddings": (None, "another name of n_positions"), "mlp_checkpoint_lvl": (0, KERNEL)},
    **{"fixed_decay": (False, "its table is handed to mixers that do not read it"), "use_cache": (True, KERNEL)},
    **{"reorder_and_upcast_attn": (False, KERNEL), "ff_mult": (2, "read by other MLPs"), **DEVICE},
    **{"bos_token_id": (50256, "the tokenizer's"), "eos_token_id": (50256, "the tokenizer's")},
    **{"process_group": (None, "cuts the tensors over machines"), "sequence_parallel": (True, KERNEL)},
}
ONE_SCALE = "the scale is 1/sqrt(width of a head) in every layer"
LM_REFUSED = {
    **{"scale_attn_weights": (True, ONE_SCALE), "scale_attn_by_inverse_layer_idx": (False, ONE_SCALE)},
    **{
        "n_head_kv": (None, "every head here has keys of its own"),
        "prenorm": (True, "every norm stands before a layer"),
    },
    **{"parallel_block": (False, "mixer and MLP stand one after the other here"), "mlp_type": ("base", NO_SUCH_MLP)},
    **{"rotary_emb_base": (10000.0, "the base of the released models"), "attn_dwconv": (False, NO_SUCH_MLP)},
    **{"rotary_emb_scale_base": (None, "rotary positions are not scaled here"), "lm_head_bias": (False, NO_SUCH_MLP)},
    **{"rotary_emb_interleaved": (False, "the halves of a head are paired here")},
    **{"tie_word_embeddings": (True, "the head of the released models is their embedding")},
    **{"word_embed_proj_dim": (None, "the embedding is as wide as the model here")},
}
LM = Arguments("GPTLMHeadModel", LM_HONOURED, LM_INERT, LM_REFUSED)
TABLES = (LM, CONV, LINEAR, SLIDING)


def official(state: dict[str, Tensor], **given):
    """GPTLMHeadModel with the fields of GPT2MixerConfig, or one of its mixers alone: BaseConv, LinearAttention,
    SlidingAttention."""
    if "Wqkv.weight" in state:
        return OfficialSliding(**sliding(width_of(given), SLIDING.complete(given))), state
    if "proj_q.weight" in state:
        return OfficialLinear(**linear(width_of(given), LINEAR.complete(given))), state
    if "in_proj.weight" in state:
        return OfficialConv(**conv(width_of(given), CONV.complete(given))), to_ours(state)
    config = LM.complete(given)
    arguments, state = language(config, state)
    kinds = {"mixer": "C", "alt_mixer": "T", "alt_mixer_2": "S"}
    return rotary(config, BasedLM(**arguments, layer_pattern=pattern(config, kinds))), state


def width_of(given: Mapping[str, Any]) -> int:
    """The width, by the one or the other of its two names; `infer` reads it off the tensors."""
    return given.get("d_model") or given["embed_dim"]


def conv(d: int, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_model": d, "d_conv": config["kernel_size"], "expand": config["expand_proj"] / 2,
            "bias": config["use_bias"]}  # fmt: skip


def linear(d: int, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_model": d, "n_heads": config["num_heads"], "feature_dim": config["feature_dim"], "eps": config["eps"]}


def sliding(d: int, config: Mapping[str, Any]) -> dict[str, Any]:
    heads, rotary = config["num_heads"], config["rotary_emb_dim"]
    if rotary not in (None, 0, d // heads):
        raise ValueError(f"rotary_emb_dim is {rotary}: here all {d // heads} channels of a head rotate, or none (0)")
    if config["qkv_proj_bias"] != config["out_proj_bias"]:
        raise ValueError("qkv_proj_bias and out_proj_bias must be equal: the projections here share one setting")
    window = config["window_size"] // 2 + 1  # half of it, and the token itself
    return {"d_model": d, "n_heads": heads, "window": window, "rope": rotary != 0, "bias": config["qkv_proj_bias"]}


def language(config: Mapping[str, Any], state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """GPT2MixerConfig's fields -> (arguments of BasedLM but for the pattern, the state under our names)."""
    d, heads = config["n_embd"], config["n_head"]
    refuse_other_parts(config)
    c = CONV.complete(config["mixer"] or {})
    t = dict(config["alt_mixer"] or {})
    s = SLIDING.complete({"num_heads": heads} | dict(config["alt_mixer_2"] or {}))
    for at, mixer in (("alt_mixer", t), ("alt_mixer_2", s)):
        if mixer.get("num_heads", heads) != heads:
            raise ValueError(f"{at}.num_heads is {mixer['num_heads']}: attention layers here have n_head={heads} heads")
    theirs = clean(state)
    table = theirs.get("transformer.embeddings.position_embeddings.weight")
    arguments = {
        **{"vocab_size": config["vocab_size"], "d_model": d, "n_layer": config["n_layer"], "n_heads": heads},
        **{"feature_dim": t.get("feature_dim", 16), "window": sliding(d, s)["window"], "d_conv": c["kernel_size"]},
        **{"conv_expand": c["expand_proj"] / 2, "conv_bias": c["use_bias"], "d_ff": config["n_inner"] or 4 * d},
        **{"norm_eps": config["layer_norm_epsilon"], "residual_in_fp32": config["residual_in_fp32"]},
        **{"pad_vocab_size_multiple": config["pad_vocab_size_multiple"]},
        **{"n_positions": 0 if table is None else len(table)},
    }
    return arguments, to_ours(theirs)


def refuse_other_parts(config: Mapping[str, Any]) -> None:
    """ValueError for what GPTLMHeadModel can have and the released models have not."""
    if (given := config["activation_function"]) != "swiglu":
        own = ", the class's own," if given == LM_HONOURED["activation_function"] else ""
        raise ValueError(
            f"activation_function={given!r}{own} is not here: only the gated MLP with SiLU is. Which gate a file was "
            f"trained with its tensors do not tell: activation_function='swiglu' says it"
        )
    for name, wanted in {"rms_norm": True, "mlp_fc1_bias": False, "mlp_fc2_bias": False}.items():
        if config[name] not in (None, wanted):
            raise ValueError(f"{name}={config[name]}: the models here have RMSNorm, and MLPs without biases")
    if config["qkv_proj_bias"] or config["out_proj_bias"]:
        raise ValueError("qkv_proj_bias and out_proj_bias: the windows of the language models here have no biases")


def rotary(config: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """The windows turn their queries and keys by the positions over all of a head, or not at all (the class's own)."""
    fraction, width = config["rotary_emb_fraction"], config["n_embd"] // config["n_head"]
    if int(fraction * width) not in (0, width):
        raise ValueError(f"rotary_emb_fraction is {fraction}: here all {width} channels of a head rotate, or none (0)")
    for module in model.modules():
        if isinstance(module, SlidingAttention):
            module.rope = int(fraction * width) > 0
    return model


def pattern(config: Mapping[str, Any], letters: Mapping[str, str]) -> str:
    """One letter per layer."""
    first, second = set(config["alt_mixer_layers"] or ()), set(config["alt_mixer_2_layers"] or ())
    names = ("alt_mixer_2" if i in second else "alt_mixer" if i in first else "mixer" for i in range(config["n_layer"]))
    return "".join(letters[name] for name in names)


def clean(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix of the hub's files, counters of metrics, and a table of decays that no mixer reads."""
    state = {key.removeprefix("model."): value for key, value in state.items()}
    unread = ("train_metric", "val_metric", "test_metric", "transformer.decay.")
    return {key: value for key, value in state.items() if not key.startswith(unread)}


def to_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    alone = {k.replace("conv.conv.", "conv.").replace("conv1.conv.", "conv."): v for k, v in state.items()}
    if "in_proj.weight" in state:
        return alone
    ours = NAMES.to_ours(state)
    word = ours.get("backbone.embedding.weight", ours.get("lm_head.weight"))
    return ours if word is None else ours | {"lm_head.weight": word}


def from_official(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return to_ours(clean(state))


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(module, GatedConv):
        return {k.replace("conv.weight", "conv.conv.weight"): v for k, v in state.items()}
    return NAMES.to_theirs(state)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All but heads and windows, which leave no trace."""
    if "out_proj.weight" in state:
        named_embed_dim = "Wqkv.weight" in state or "proj_k_enc.weight" in state
        inferred = {"embed_dim" if named_embed_dim else "d_model": len(state["out_proj.weight"])}
        if "Wqkv.weight" in state:
            inferred |= {"qkv_proj_bias": "Wqkv.bias" in state, "out_proj_bias": "out_proj.bias" in state}
        return inferred
    state = clean(state)
    words = state.get("transformer.embeddings.word_embeddings.weight")
    if words is None:
        return {}
    layers = range(count(state, "transformer.layers.#."))
    linear = [i for i in layers if f"transformer.layers.{i}.mixer.proj_q.weight" in state]
    windows = [i for i in layers if f"transformer.layers.{i}.mixer.Wqkv.weight" in state]
    inferred = {"n_embd": words.shape[1], "n_layer": len(layers), "vocab_size": len(words)}
    inferred |= {"alt_mixer_layers": linear, "alt_mixer_2_layers": windows}
    inferred |= {"rms_norm": "transformer.ln_f.bias" not in state}
    inferred |= {f"mlp_{fc}_bias": f"transformer.layers.0.mlp.{fc}.bias" in state for fc in ("fc1", "fc2")}
    if given.get("n_inner") is None and layers:
        inferred["n_inner"] = len(state["transformer.layers.0.mlp.fc1.weight"]) // 2
    if convolutions := [i for i in layers if i not in (*linear, *windows)]:
        inferred["mixer"] = infer_conv(part(state, f"transformer.layers.{convolutions[0]}.mixer."))
    heads = given.get("n_head", LM.default("n_head"))
    if linear and (rows := len(state[f"transformer.layers.{linear[0]}.mixer.proj_q.weight"])) % heads == 0:
        inferred["alt_mixer"] = {"feature_dim": rows // heads}
    return inferred


def infer_conv(state: dict[str, Tensor]) -> dict[str, Any]:
    rows, d = state["in_proj.weight"].shape
    taps = next(value for key, value in state.items() if value.ndim == 3).shape[-1]
    return {"expand_proj": ratio(rows, d), "kernel_size": taps, "use_bias": "in_proj.bias" in state}


class OfficialConv(GatedConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class OfficialSliding(SlidingAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class OfficialSums:
    """forward(x) -> y; forward(x, x_next) -> y, outputs decoded token by token, and the two states after x."""

    def forward(self, x: Tensor, x_next: Tensor | None = None, **more):
        y, state = super().forward(x, **more)
        if x_next is None:
            return y
        kv, k = self.official_sums(state.sums)
        steps = []
        for token in x_next.split(1, dim=1):
            step, state = super().forward(token, state)
            steps.append(step)
        return y, torch.cat(steps, dim=1), kv, k

    def official_sums(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """(b h n p+1) -> (b h 1 p N), (b h 1 1 N) with the N = 1 + f + f^2 products of the published feature map."""
        f = self.feature_dim
        i, j = torch.triu_indices(f, f)
        pairs = sums.new_zeros(*sums.shape[:2], f, f, sums.shape[-1])
        half = sums[:, :, 1 + f :] * torch.where(i == j, 1.0, 0.5**0.5).to(sums)[:, None]
        pairs[:, :, i, j], pairs[:, :, j, i] = half, half
        full = torch.cat([sums[:, :, : 1 + f], pairs.flatten(2, 3)], dim=2).transpose(2, 3)  # (b h p+1 N)
        return full[:, :, None, :-1], full[:, :, None, -1:]


class OfficialLinear(OfficialSums, TaylorAttention):
    """LinearAttention with its inputs and outputs."""


def golden(case) -> dict[str, Tensor]:
    got = case.run_official()
    return got if "logits" not in got else {"logits": got["logits"]}


RELEASED = {  # what the tensors do not tell
    **{"n_head": 16, "vocab_size": 50257, "pad_vocab_size_multiple": 8, "activation_function": "swiglu"},
    **{"rotary_emb_fraction": 1, "residual_in_fp32": True},
}


def released(preset: str, repo: str, metric: str, tag: str = "", licence: str | None = None, **more) -> Weights:
    """A file of HazyResearch on the hub: the sizes are in the tensors, the 16 heads (and `more`) are not."""
    return Weights(
        preset,
        Hub(f"hazyresearch/{repo}", "pytorch_model.bin"),
        **{"tag": tag, "licence": licence, "tokenizer": "openai-community/gpt2", "metric": metric},
        arguments=RELEASED | more,
        note="" if licence else "the code is Apache-2.0; a licence of this file was not found",
    )


CATALOGUE = (
    released("based_360m", "based-360m", "SWDE 25.65, FDA 14.34, SQuAD 24.23 (10B tokens)", licence="apache-2.0"),
    released(
        *("based_360m", "based-360M-30B", "FDA 50.3, SWDE 30.4, NQ 19.7, SQuAD 29.8 (30B tokens)"),
        **{"tag": "30b", "licence": "apache-2.0"},
    ),
    released("based_1b", "based-1b", "SWDE 37.71, FDA 19.06, SQuAD 29.49 (10B tokens)"),
    released("based_1b", "based-1b-50b", "FDA 69.3, SWDE 47.6, NQ 29.1, SQuAD 38.5 (50B tokens)", tag="50b"),
)
