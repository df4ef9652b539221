"""llm-random's (Apache-2.0) language models: MoE-Mamba, and the Transformers that its paper compares with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.layers.decoder import Block
from ssmzoo.layers.feedforward.mlp import FeedForward
from ssmzoo.layers.feedforward.moe import build_moe
from ssmzoo.layers.feedforward.router import TokenChoice
from ssmzoo.layers.mixers.attention import Attention
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.moe_mamba import DecoderLM, InnerMoEMamba, MoEMambaLM
from ssmzoo.released.moe import official_options
from ssmzoo.released.names import Names, add_prefix, cut_prefix
from ssmzoo.suggest import nearest

MODELS = (MoEMambaLM, TransformerLM)
TELLING_KEYS = r"router|expert"


def official(
    state: dict[str, Tensor],
    *,
    block_modules,
    n_blocks: int,
    dmodel: int,
    vocab_size: int,
    mamba_mode: str = "vanilla",
    mamba_expansion: float = 2,
    ff_mode: str = "vanilla",
    n_experts: int = 1,
    expert_size: int = 1,
    expert: str = "ff",
    activation: str = "relu",
    parallel_blocks: bool = False,
    n_att_heads: int = 1,
    dhead: int | None = None,
    dff: int | None = None,
    cutoff: int | None = None,
    batch_size: int | None = None,
    capacity_factor: float = 1.25,
    load_balancing_loss_weight: float = 0.01,
    zloss_weight: float = 0.0,
    routing_top_k: int = 1,
    topk_fraction: float = 1.0,
    softmax_over: str = "tokens",
    group_by_batch: bool = False,
    group_size: int = 1,
    use_layer_norm: bool = True,
    one_hot_impl: bool = False,
    use_torch_bmm: bool = False,
    use_einsum: bool = False,
    init_type: str | None = None,
    init_scale: float = 0.1,
):
    """llm-random's LLM as its cc_train builds it. Outputs: logits, with Switch layers the sum of their
    load_balancing_loss (and of z_loss if zloss_weight > 0), and the mean next-token cross entropy in nats.

    dff is 4 dmodel by default. cutoff and batch_size are shapes that the official class fixes; ours takes any.
    one_hot_impl, use_torch_bmm and use_einsum choose among equal implementations, init_type and init_scale an
    initialisation that is overwritten.
    """
    switch = dict(
        capacity_factor=capacity_factor,
        load_balancing_loss_weight=load_balancing_loss_weight,
        zloss_weight=zloss_weight,
        routing_top_k=routing_top_k,
    )
    choice = dict(
        topk_fraction=topk_fraction,
        softmax_over=softmax_over,
        group_by_batch=group_by_batch,
        group_size=group_size,
        use_layer_norm=use_layer_norm,
    )
    modes = ("vanilla", "token_choice", "expert_choice")
    if ff_mode not in modes:
        raise ValueError(f"unknown ff_mode {ff_mode!r}{nearest(ff_mode, modes)}; choose one of {', '.join(modes)}")
    options = official_options(ff_mode, expert, activation, **switch, **choice)

    def moe(d_input: int, d_output: int) -> nn.Module:
        return build_moe(d_input, n_experts, expert_size, d_output=d_output, **options)

    def inner_moe(d_input: int, d_output: int) -> nn.Module:  # Switch-routed; the paper's are two ReLU layers
        gated = any(".mamba." in key and key.endswith(".gate_weight") for key in state)
        kind = (expert, activation) if gated else ("ff", "relu")
        return build_moe(
            d_input, n_experts, expert_size, d_output=d_output, **official_options("token_choice", *kind, **switch)
        )

    def layer(kind: str) -> nn.Module:
        if kind == "attention":
            return Attention(dmodel, n_att_heads, d_head=dhead)
        if kind == "feedforward":
            biased = any(key.endswith("logging_ff_pre_relu.bias") for key in state)
            return FeedForward(dmodel, dff or 4 * dmodel, bias=biased) if ff_mode == "vanilla" else moe(dmodel, dmodel)
        if kind != "mamba":
            known = ("mamba", "attention", "feedforward")
            raise ValueError(f"unknown block module {kind!r}{nearest(kind, known)}; choose from {', '.join(known)}")
        if mamba_mode == "vanilla":
            return Mamba(dmodel, expand=mamba_expansion)
        places = {"conv": "conv", "gate": "gate", "out": "output"}
        words = mamba_mode.removesuffix("_proj_moe").split("_")
        chosen = tuple(ours for theirs, ours in places.items() if theirs in words)
        if not mamba_mode.endswith("_proj_moe") or not chosen:
            raise ValueError(
                f"unknown mamba_mode {mamba_mode!r}; it is 'vanilla' or names some of conv, gate and out, "
                "such as 'conv_gate_proj_moe'"
            )
        return InnerMoEMamba(dmodel, chosen, inner_moe, expand=mamba_expansion)

    blocks = [Block(dmodel, {kind: layer(kind) for kind in block_modules}, parallel_blocks) for _ in range(n_blocks)]
    switched = any(isinstance(m, TokenChoice) for block in blocks for m in block.modules())
    losses = ["load_balancing_loss"] * switched + ["z_loss"] * (switched and zloss_weight > 0)
    model = _OfficialLM(DecoderLM(vocab_size, dmodel, blocks), losses)
    kept = {key: value for key, value in state.items() if ".rope." not in key}
    return model, add_prefix("model.", names(block_modules, parallel_blocks).to_ours(kept))


def names(block_modules, parallel: bool) -> Names:
    """encoder.blocks.block_0.block.residual_mamba.layer.mamba.D <-> blocks.0.layers.mamba.D, and so on."""
    block = "encoder.blocks.block_{i}.block."
    pairs = [("embedding_layer.layers.0.{p}", "embedding.{p}")]
    if parallel:
        pairs += [(block + "residual_parallel.layer.pre_norm.{p}", "blocks.{i}.norms.shared.{p}")]
    for n, kind in enumerate(block_modules):
        at = block + (f"residual_parallel.layer.parallel.layers.{n}." if parallel else f"residual_{kind}.layer.{kind}.")
        ours = f"blocks.{{i}}.layers.{kind}."
        if not parallel:
            pairs += [(f"{block}residual_{kind}.layer.pre_norm.{{p}}", f"blocks.{{i}}.norms.{kind}.{{p}}")]
        pairs += [
            (at + "logging_ff_pre_relu.{p}", ours + "fc1.{p}"),
            (at + "logging_ff_post_relu.{p}", ours + "fc2.{p}"),
            (at + "ln.l.{p}", ours + "ln.{p}"),
            (at + "in_proj.{half}.router.{p}", ours + "in_proj.{half}.gating.{p}"),  # experts inside Mamba
            (at + "out_proj.router.{p}", ours + "out_proj.gating.{p}"),
            (at + "{rest}", ours + "{rest}"),
        ]
    return Names(*pairs)


def from_official(model: DecoderLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {key: value for key, value in state.items() if ".rope." not in key}
    block = model.blocks[0]
    return names(list(block.layers), "shared" in block.norms).to_ours(kept)


def to_official(module: nn.Module, state: dict[str, Tensor], cutoff: int | None = None) -> dict[str, Tensor]:
    """llm-random's names. Its rotary tables are for sequences of `cutoff` tokens; without it they are left out."""
    model = module.model if isinstance(module, _OfficialLM) else module
    block = model.blocks[0]
    theirs = names(list(block.layers), "shared" in block.norms).to_theirs(cut_prefix("model.", state))
    if cutoff is not None:
        for key in [key for key in theirs if key.endswith("attention.input_projection.weight")]:
            attention = model.blocks[int(key.split("block_")[1].split(".")[0])].layers["attention"]
            cos, sin = rotary_tables(attention.d_head, cutoff)
            at = key.removesuffix("input_projection.weight")
            theirs |= {f"{at}rope.cos": cos, f"{at}rope.sin": sin}
    return theirs


def rotary_tables(d: int, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin (length d), both halves equal, as llm-random stores them."""
    angles = torch.pow(1 / 10000, torch.arange(0, d, 2) / d)[None] * torch.arange(length)[:, None]
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


class _OfficialLM(nn.Module):
    def __init__(self, model: DecoderLM, losses: list[str]):
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, input_ids: Tensor):
        logits, _, aux = self.model(input_ids)
        losses = [aux.get(name, logits.new_zeros(())) for name in self.losses]
        cross_entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return logits, *losses, cross_entropy


def golden(case) -> dict[str, Tensor]:
    """Outputs by name: cases with a z-loss need not list it."""
    module, state = official(dict(case.params), **case.official_kwargs)
    module.train(not case.meta.get("eval_mode", True))
    outputs = torch.func.functional_call(module, state, (case.inputs["input_ids"],))
    return dict(zip(("logits", *module.losses, "cross_entropy"), outputs))
