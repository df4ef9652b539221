"""Hydra's public prototype (sidcraftscode/Hydra), ToyHydra; no weights were released, golden cases are transcribed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.models.hydra_lm import HydraLM
from ssmzoo.released.arguments import Arguments
from ssmzoo.released.infer import count, part
from ssmzoo.released.names import Names

MODELS = (HydraLM,)
TELLING_KEYS = (r"^blocks\.0\.g1$", r"^blocks\.0\.res_ln\.weight$")
BLOCK = "blocks.{i}."
NAMES = Names(
    ("embed.{p}", "embedding.{p}"),
    (BLOCK + "attn.qkv.{p}", BLOCK + "attn.Wqkv.{p}"),
    (BLOCK + "attn.o.{p}", BLOCK + "attn.out_proj.{p}"),
    ("pkm.values", "pkm.values.weight"),
)
EXPERTS = {"w_in": "lin1_weight", "w_gate": "gate_weight", "w_out": "lin2_weight"}
TOY = Arguments(
    "ToyHydra",
    {
        **{"d": 256, "vocab_size": 4000, "n_blocks": 8, "attn_every": 4, "n_heads": 4, "window": 256},
        **{"moe_experts": 4, "moe_hidden": 256, "chunk_size": 32, "gate_temp": 1.0, "fast_ssm": True},
        **{"moe_on": None, "disable_moe": None, "disable_attn": None, "aux_load_balance_weight": 0.01},
        **{"use_pkm": False, "pkm": None, "legacy_chunk_reshape": True},  # the last is ours: False mends the weights
    },
    {},
    {
        "vector_moe": (True, "the loop over experts does not run there either: its masks have an axis too many"),
        "use_workspace": (
            False,
            "its names were not seen; HydraLM(workspace='published') has a workspace of its own names",
        ),
    },
)
TABLES = (TOY,)
PKM = {"n1": "n1", "n2": "n2", "key_dim": "key_dim", "value_dim": "value_dim", "topk": "top_k"}


def official(state: dict[str, Tensor], **given):
    """ToyHydra; outputs: logits. Its chunks are routed by their own means, with the weights in the published order."""
    c = TOY.complete(given)
    every_other = list(range(0, c["n_blocks"], 2))
    if c["moe_on"] not in (None, every_other):
        raise ValueError(f"moe_on={c['moe_on']}: experts stand in every other block here, {every_other}")
    if c["disable_attn"]:
        c["attn_every"] = 0
    if c["disable_moe"]:
        c["moe_experts"] = 0
    pkm = {PKM[key]: value for key, value in (c["pkm"] or {}).items()} if c["use_pkm"] else None
    model = OfficialHydra(
        c["vocab_size"],
        c["d"],
        c["n_blocks"],
        "conv" if c["fast_ssm"] else "recurrent",
        c["attn_every"],
        c["n_heads"],
        c["window"],
        c["moe_experts"],
        c["moe_hidden"],
        c["chunk_size"],
        c["gate_temp"],
        c["aux_load_balance_weight"],
        routing="chunk",
        legacy_chunk_reshape=c["legacy_chunk_reshape"],
        pkm=pkm,
    )
    return model, from_official(model, state)


def from_official(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks the experts' matrices, (out, in) there and (in, out) here; the head is the embedding."""
    ours = {}
    for key, value in NAMES.to_ours(state).items():
        at, found, rest = key.partition("moe.experts.")
        if found:
            number, name, _ = rest.split(".")
            if number == "0":
                experts = range(count(state, f"{at}moe.experts.#."))
                stack = [state[f"{at}moe.experts.{e}.{name}.weight"].T for e in experts]
                ours[f"{at}moe.experts.{EXPERTS[name]}"] = torch.stack(stack)
        elif key.endswith("moe.gate.weight"):
            ours[key.replace("gate.weight", "gating.gate")] = value.T
        elif key in ("pkm.k1", "pkm.k2"):
            ours[f"pkm.keys.keys{key[-1]}"] = value[None]
        else:
            ours[key] = value
    return ours | {"head.weight": ours["embedding.weight"]}


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The prototype's names, without the tied head."""
    theirs, names = {}, {ours: name for name, ours in EXPERTS.items()}
    for key, value in NAMES.to_theirs(state).items():
        at, found, rest = key.partition("moe.experts.")
        if found:
            for e, matrix in enumerate(value):
                theirs[f"{key.removesuffix(rest)}{e}.{names[rest]}.weight"] = matrix.T.contiguous()
        elif key.endswith("moe.gating.gate"):
            theirs[key.replace("gating.gate", "gate.weight")] = value.T.contiguous()
        elif key.startswith("pkm.keys.keys"):
            theirs[f"pkm.k{key[-1]}"] = value[0]
        elif key != "head.weight":
            theirs[key] = value
    return theirs


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes; heads, window, chunks and the temperature have no weights."""
    blocks = count(state, "blocks.#.")
    attention = [i for i in range(blocks) if f"blocks.{i}.attn.o.weight" in state]
    inferred: dict[str, Any] = {"n_blocks": blocks, "disable_attn": not attention}
    if attention:
        inferred["attn_every"] = attention[0] + 1
    inferred["vocab_size"], inferred["d"] = state["embed.weight"].shape
    inferred["moe_on"] = [i for i in range(blocks) if f"blocks.{i}.moe.gate.weight" in state]
    inferred["disable_moe"] = not inferred["moe_on"]
    if inferred["disable_moe"]:
        inferred["moe_on"] = None
    else:
        at = f"blocks.{inferred['moe_on'][0]}.moe.experts."
        inferred |= {"moe_experts": count(state, f"{at}#."), "moe_hidden": len(state[f"{at}0.w_in.weight"])}
    inferred["fast_ssm"] = "blocks.0.ssm.dw_conv.weight" in state
    pkm = part(state, "pkm.")
    inferred["use_pkm"] = bool(pkm)
    if pkm:
        (n1, key_dim), n2 = pkm["k1"].shape, len(pkm["k2"])
        inferred["pkm"] = {"n1": n1, "n2": n2, "key_dim": key_dim, "value_dim": pkm["values"].shape[1]}
    return inferred


class OfficialHydra(HydraLM):
    """forward(input_ids) -> logits."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).logits
