"""llm-random's (Apache-2.0) language models: MoE-Mamba, and the Transformers that its paper compares with."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.decoder import Block
from ssmzoo.layers.feedforward.mlp import FeedForward
from ssmzoo.layers.feedforward.router import TokenChoice
from ssmzoo.layers.mixers.attention import Attention
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.moe_mamba import DecoderLM, InnerMoEMamba, MoEMambaLM
from ssmzoo.released.arguments import INITIAL, KERNEL, Arguments
from ssmzoo.released.fit import refuse_other_constants
from ssmzoo.released.infer import count, part, ratio
from ssmzoo.released.moe import CHOICE, EQUAL, SWITCH, WITHOUT, official_moe
from ssmzoo.released.names import Names
from ssmzoo.suggest import nearest

MODELS = (MoEMambaLM, TransformerLM)
TELLING_KEYS = r"router|expert|^encoder\.blocks\.block_\d+\."


SHAPE = "a shape that the official class fixes; ours takes any"
YAML = {  # what the runner's yaml calls arguments of the layers
    **{"activation_type": "activation", "moe_inner_expert": "expert"},
    **{"group_granular_moe_by_batch": "group_by_batch", "layer_norm_in_expert_choice": "use_layer_norm"},
}
LLM = Arguments(
    "LLM",  # as cc_train builds it
    {
        **{"mamba_mode": "vanilla", "mamba_expansion": 2, "ff_mode": "vanilla", "n_experts": 1, "expert_size": 1},
        **{"expert": "ff", "activation": "relu", "parallel_blocks": False, "n_att_heads": None, "dhead": None},
        **{"dff": None, "attention_mode": "vanilla", "moe_values_exp": None, **SWITCH, **CHOICE},
        **{"norm_class": "layer_norm", "residual_mode": "pre_norm", "every_other_layer": False},
        **{"standard_ff_first": False, "block_modules": ("attention", "feedforward")},
        **dict.fromkeys(YAML),
    },
    WITHOUT
    | {
        **{"granular_moe_one_hot_impl": (False, EQUAL), "use_full_einsum": (False, EQUAL)},
        **{"dont_vectorize_switch": (False, EQUAL), "flash_attention": (False, KERNEL)},
        **{"expert_use_topk_initialization": ("Default", INITIAL), "relative_init_scale": (None, INITIAL)},
        **{"moe_detach_gate": (False, "acts in training only"), "model_type": ("gpt", "BERT's mask is the runner's")},
        **{"cutoff": (None, SHAPE), "batch_size": (None, SHAPE)},
        "no_positional_embedding": (False, "whether positions are learned, which the tensors tell"),
    },
    {
        "get_router_values_from": ("weights", "the router here has weights of its own"),
        "softmax_ungrouped": (False, "the softmax here is taken over the group"),
        "no_ff": (False, "leave 'feedforward' out of block_modules"),
    },
    required=("n_blocks", "dmodel", "vocab_size"),
)
TABLES = (LLM,)
MODES = ("vanilla", "swi_glu", "token_choice", "expert_choice")
POSITIONS = "embedding_layer.layers.1.layer.weight"
PARTS = {"conv": "conv", "gate": "gate", "out": "output"}


def official(state: dict[str, Tensor], **given):
    """llm-random's LLM. Outputs: logits, with Switch layers the sum of their load_balancing_loss (and of z_loss if
    zloss_weight > 0), and the mean next-token cross entropy in nats. dff is 4 dmodel by default."""
    config = LLM.complete(given)
    config |= {ours: config[name] for name, ours in YAML.items() if config[name] is not None}
    for name, choices in (("ff_mode", MODES), ("norm_class", NORMS), ("residual_mode", BLOCKS)):
        if (value := config[name]) not in choices:
            raise ValueError(f"unknown {name} {value!r}{nearest(value, choices)}; choose one of {', '.join(choices)}")
    if config["zloss_weight"] and config["ff_mode"] == "expert_choice":
        raise ValueError("zloss_weight: expert choice has no z-loss")
    d, modules, parallel = config["dmodel"], config["block_modules"], config["parallel_blocks"]
    make, norm = BLOCKS[config["residual_mode"]], NORMS[config["norm_class"]]
    blocks = [
        make(d, {kind: sublayer(kind, config, state, i) for kind in modules}, parallel, norm)
        for i in range(config["n_blocks"])
    ]
    switched = any(isinstance(m, TokenChoice) for block in blocks for m in block.modules())
    losses = ["load_balancing_loss"] * switched + ["z_loss"] * (switched and config["zloss_weight"] > 0)
    model = _OfficialLM(DecoderLM(config["vocab_size"], d, blocks), losses, state.get(POSITIONS))
    return model, names(modules, parallel, make is PostNormBlock).to_ours(without_tables(state))


def sublayer(kind: str, config: dict[str, Any], state: dict[str, Tensor], i: int) -> nn.Module:
    """One entry of block_modules in block i: "attention", "feedforward" or "mamba"."""
    d = config["dmodel"]
    if kind == "attention":
        rope = config["attention_mode"] == "rope"
        if config["n_att_heads"] is None:
            raise TypeError("LLM: n_att_heads cannot be inferred from the tensors and must be given by name")
        return Attention(d, config["n_att_heads"], d_head=config["dhead"], rope=rope)
    if kind == "feedforward":
        dense = config["every_other_layer"] and i % 2 == (0 if config["standard_ff_first"] else 1)
        if config["ff_mode"] == "swi_glu" and not dense:
            return SwiGLUFeedForward(d, config["dff"] or 4 * d)
        if config["ff_mode"] != "vanilla" and not dense:
            return experts(config, config["ff_mode"], d, d)
        biased = any(key.endswith("logging_ff_pre_relu.bias") for key in state)
        return FeedForward(d, config["dff"] or 4 * d, bias=biased)
    if kind != "mamba":
        known = ("mamba", "attention", "feedforward")
        raise ValueError(f"unknown block module {kind!r}{nearest(kind, known)}; choose from {', '.join(known)}")
    if (mode := config["mamba_mode"]) == "vanilla":
        return Mamba(d, expand=config["mamba_expansion"])
    words = mode.removesuffix("_proj_moe").split("_")
    chosen = tuple(ours for theirs, ours in PARTS.items() if theirs in words)
    if not mode.endswith("_proj_moe") or not chosen:
        raise ValueError(
            f"unknown mamba_mode {mode!r}; it is 'vanilla' or names some of conv, gate and out, "
            "such as 'conv_gate_proj_moe'"
        )
    gated = any(".mamba." in key and key.endswith(".gate_weight") for key in state)
    inside = config if gated else config | {"expert": "ff", "activation": "relu"}  # the paper's: two ReLU layers
    return InnerMoEMamba(
        d, chosen, functools.partial(experts, inside, "token_choice"), expand=config["mamba_expansion"]
    )


def experts(config: dict[str, Any], kind: str, d_input: int, d_output: int) -> nn.Module:
    options = {key: config[key] for key in ("expert", "activation", *(CHOICE if kind == "expert_choice" else SWITCH))}
    if kind == "token_choice":
        options["moe_values_exp"] = config["moe_values_exp"]
    return official_moe(kind, d_input, config["n_experts"], config["expert_size"], d_output, **options)


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, the sublayers of a block, the experts' kinds and the attention's; its number of heads with a rotary table.
    Routing (capacity, top k, fractions) has no weights."""
    first, second = (part(state, f"encoder.blocks.block_{i}.block.") for i in (0, 1))
    if not first:
        return {}
    post = any(".post_norm." in key for key in first)
    feedforwards = [
        part(block, f"residual_feedforward.{'feedforward.layer' if post else 'layer.feedforward'}.")
        for block in (first, second)
    ]
    rows, d = state["embedding_layer.layers.0.weight"].shape
    inferred = {"vocab_size": rows, "dmodel": d, "n_blocks": count(state, "encoder.blocks.block_#.")}
    parallel = any(key.startswith("residual_parallel.") for key in first)
    inferred["parallel_blocks"] = parallel
    if not parallel and list(first) != sorted(first):  # a file with sorted names hides the order of the sublayers
        inferred["block_modules"] = list(dict.fromkeys(key.split(".")[0].removeprefix("residual_") for key in first))
    inferred["residual_mode"] = "post_norm" if post else "pre_norm"
    inferred["norm_class"] = "rms_norm" if any(key.endswith("_norm.g") for key in first) else "layer_norm"
    chosen = [i for i, layer in enumerate(feedforwards) if "gating.gate" in layer or "w1_gate.weight" in layer]
    if len(chosen) == 1 and second:  # the other is dense
        inferred |= {"every_other_layer": True, "standard_ff_first": chosen == [1]}
        inferred["dff"] = len(feedforwards[1 - chosen[0]]["logging_ff_pre_relu.weight"])
    feedforward = feedforwards[chosen[0] if chosen else 0]
    if "w1_gate.weight" in feedforward:
        inferred |= {"ff_mode": "swi_glu", "dff": len(feedforward["w1_gate.weight"]) // 2}
    elif "gating.gate" in feedforward:
        inferred |= {"n_experts": feedforward["gating.gate"].shape[1]}
        inferred |= {"expert_size": feedforward["expert_inner_function.lin1_weight"].shape[-1]}
        inferred["ff_mode"] = "expert_choice" if "ln.l.weight" in feedforward else given.get("ff_mode", "token_choice")
    elif "logging_ff_pre_relu.weight" in feedforward:
        inferred |= {"ff_mode": "vanilla", "dff": len(feedforward["logging_ff_pre_relu.weight"])}
    table = next((value for key, value in first.items() if key.endswith("rope.cos")), None)
    attention = next((value for key, value in first.items() if key.endswith("attention.input_projection.weight")), None)
    if attention is not None:
        inferred["attention_mode"] = "vanilla" if table is None else "rope"
        if table is not None:
            inferred |= {"dhead": table.shape[1], "n_att_heads": len(attention) // (3 * table.shape[1])}
    inner = next((value for key, value in first.items() if key.endswith("mamba.D")), None)
    if inner is not None:
        inferred["mamba_expansion"] = ratio(len(inner), d)
    return inferred


def names(block_modules, parallel: bool, post: bool = False, prefix: str = "model.") -> Names:
    """encoder.blocks.block_0.block.residual_mamba.layer.mamba.D <-> blocks.0.layers.mamba.D, and so on; the norms of
    `post` stand behind the sums. prefix: of our names"""
    block, inside, norm = "encoder.blocks.block_{i}.block.", "layer.{kind}.", "layer.pre_norm."
    if post:
        inside, norm = "{kind}.layer.", "post_norm."
    wrapped = "residual_parallel." + inside.format(kind="parallel")
    pairs = [("embedding_layer.layers.0.{p}", prefix + "embedding.{p}"), (POSITIONS, "positions.weight")]
    if parallel:
        pairs += [(f"{block}residual_parallel.{norm}{{p}}", prefix + "blocks.{i}.norms.shared.{p}")]
    for n, kind in enumerate(block_modules):
        at = block + (f"{wrapped}layers.{n}." if parallel else f"residual_{kind}." + inside.format(kind=kind))
        ours = f"{prefix}blocks.{{i}}.layers.{kind}."
        if not parallel:
            pairs += [(f"{block}residual_{kind}.{norm}{{p}}", f"{prefix}blocks.{{i}}.norms.{kind}.{{p}}")]
        pairs += [
            (at + "logging_ff_pre_relu.{p}", ours + "fc1.{p}"),
            (at + "logging_ff_post_relu.{p}", ours + "fc2.{p}"),
            (at + "ln.l.{p}", ours + "ln.{p}"),
            (at + "in_proj.{half}.router.{p}", ours + "in_proj.{half}.gating.{p}"),  # experts inside Mamba
            (at + "out_proj.router.{p}", ours + "out_proj.gating.{p}"),
            (at + "{rest}", ours + "{rest}"),
        ]
    return Names(*pairs, *[("{rest}", prefix + "{rest}")] * bool(prefix))


def from_official(model: DecoderLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    block = model.blocks[0]
    return names(list(block.layers), "shared" in block.norms, prefix="").to_ours(without_tables(state))


def without_tables(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the rotary tables: ours are computed, different ones are refused."""
    tables = {key: value for key, value in state.items() if ".rope." in key}
    for key, value in tables.items():
        cos, sin = rotary_tables(value.shape[1], value.shape[0])
        refuse_other_constants({key: value}, {key: cos if key.endswith("cos") else sin})
    return {key: value for key, value in state.items() if key not in tables}


def to_official(module: nn.Module, state: dict[str, Tensor], cutoff: int | None = None) -> dict[str, Tensor]:
    """llm-random's names. Its rotary tables are for sequences of `cutoff` tokens; without it they are left out."""
    model, prefix = (module.model, "model.") if isinstance(module, _OfficialLM) else (module, "")
    block = model.blocks[0]
    post = isinstance(block, PostNormBlock)
    theirs = names(list(block.layers), "shared" in block.norms, post, prefix).to_theirs(state)
    if cutoff is not None:
        for key in [key for key in theirs if key.endswith("attention.input_projection.weight")]:
            attention = model.blocks[int(key.split("block_")[1].split(".")[0])].layers["attention"]
            if not attention.rope:
                continue
            cos, sin = rotary_tables(attention.d_head, cutoff)
            at = key.removesuffix("input_projection.weight")
            theirs |= {f"{at}rope.cos": cos, f"{at}rope.sin": sin}
    return theirs


def rotary_tables(d: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (length d), both halves equal, as llm-random stores them."""
    angles = torch.pow(1 / 10000, torch.arange(0, d, 2) / d)[None] * torch.arange(length)[:, None]
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


class SwiGLUFeedForward(nn.Module):
    """W_2 (SiLU(a) b) with [a, b] = W_1 x, (... d) -> (... d)"""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1_gate = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w1_gate(x).chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)


class ShiftedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-5) g + b"""

    def __init__(self, dim: int):
        super().__init__()
        self.g, self.b = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.g.shape, self.g, 1e-5) + self.b


class PostNormBlock(Block):
    """x <- norm(x + f(x)) for every sublayer; in parallel x <- norm(x + f_1(x) + f_2(x) + ...)."""

    def sublayers(self):
        nothing = nn.Identity()
        return [
            (n, None if self.parallel and i else nothing, layer) for i, (n, layer) in enumerate(self.layers.items())
        ]

    def residual(self, name: str, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
        if self.parallel:
            return self.norms["shared"](x + y) if name == list(self.layers)[-1] else x + y
        return self.norms[name](x + y)


NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": ShiftedRMSNorm}
BLOCKS = {"pre_norm": Block, "post_norm": PostNormBlock}


class _OfficialLM(nn.Module):
    """positions  table of learned positions that the file holds, or None"""

    def __init__(self, model: DecoderLM, losses: list[str], positions: Tensor | None):
        super().__init__()
        self.model, self.losses = model, losses
        self.positions = None if positions is None else nn.Embedding(*positions.shape)

    def forward(self, input_ids: Tensor):
        read = input_ids
        if self.positions is not None:
            at = torch.arange(input_ids.shape[1], device=input_ids.device)
            read = self.model.embedding(input_ids) + self.positions(at)
        logits, _, aux = self.model(read)
        losses = [aux.get(name, logits.new_zeros(())) for name in self.losses]
        cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return logits, *losses, cross_entropy


def golden(case) -> dict[str, Tensor]:
    """Outputs by name: cases with a z-loss need not list it."""
    module, state = case.build()
    module.train(not case.meta.get("eval_mode", True))
    outputs = torch.func.functional_call(module, state, (case.inputs["input_ids"],))
    return dict(zip(("logits", *module.losses, "cross_entropy"), outputs))
