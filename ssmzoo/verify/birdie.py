"""Birdie: the recurrent layers, the objectives bit for bit, the packer and the reward."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ssmzoo.data.birdie import objectives
from ssmzoo.data.birdie.packing import pack
from ssmzoo.layers.feedforward.mlp import GatedMLP
from ssmzoo.layers.mixers.gated_ssm import GatedSSM, ReleasedGatedSSM, ScaledNorm
from ssmzoo.models.hawk import HawkMixer
from ssmzoo.released.names import add_prefix, cut_prefix
from ssmzoo.tasks.objectives.birdie import reward

SWIGLU = {"wi.weight": "fc1.weight", "wo.weight": "fc2.weight"}
GATES = ("input_gate", "recurrent_gate")


def official(state: dict[str, Tensor], **given):
    """The released GatedSSM and SwiGLU (x), or RecurrentGemma's recurrent block with dense gates (x, position_ids), by
    the names of their arguments."""
    if "lru_width" in given:
        return hawk(state, **given)
    d = given["dims"]
    if "hidden_dims" in given:
        layer = GatedMLP(d, given["hidden_dims"], "sigmoid", multiple_of=1)
        names = SWIGLU
    else:
        layer, names = ReleasedGatedSSM(d, int(given["state_size_mult"] * d)), {}
    ours = {names.get(key, key): value for key, value in state.items() if not key.startswith("norm.")}
    norm = cut_prefix("norm.", {key: value for key, value in state.items() if key.startswith("norm.")})
    return Residual(ScaledNorm(d), layer), add_prefix("layer.", ours) | add_prefix("norm.", norm)


def hawk(state: dict[str, Tensor], **given):
    if given.get("num_attention_heads", 1) != 1:
        raise ValueError(
            f"num_attention_heads={given['num_attention_heads']}: the gates here are dense, one block of 1"
        )
    layer = HawkMixer(
        given["hidden_size"], given["lru_width"], given.get("conv1d_width", 4), conv_across_documents=True
    )
    ours = {key: value for key, value in state.items() if "gate_" not in key}
    for gate in GATES:
        ours[f"rg_lru.{gate}.weight"] = state[f"rg_lru.{gate}_weight"][0].T
        ours[f"rg_lru.{gate}.bias"] = state[f"rg_lru.{gate}_bias"][0]
    return Positioned(layer), add_prefix("layer.", ours)


def to_official(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {ours: theirs for theirs, ours in SWIGLU.items()} if isinstance(module.layer, GatedMLP) else {}
    ours = {names.get(key, key): value for key, value in cut_prefix("layer.", state).items()}
    for gate in GATES if isinstance(module, Positioned) else ():
        ours[f"rg_lru.{gate}_weight"] = ours.pop(f"rg_lru.{gate}.weight").T[None]
        ours[f"rg_lru.{gate}_bias"] = ours.pop(f"rg_lru.{gate}.bias")[None]
    return ours


class Masked(nn.Module):
    """reset_mask (b l): 1 at the first token of a sample, 2 in its label region and the token that starts it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, reset_mask: Tensor) -> Tensor:
        labels = reset_mask == 2
        before = nn.functional.pad(labels[:, :-1], (1, 0))
        return self.layer(x, seq_idx=(reset_mask == 1).cumsum(1), prefix=~(labels & before))[0]


class Positioned(nn.Module):
    """position_ids (b l): 0 begins a document."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return self.layer(x, seq_idx=(position_ids == 0).cumsum(1))[0]


class Residual(nn.Module):
    def __init__(self, norm: nn.Module, layer: nn.Module):
        super().__init__()
        self.norm, self.layer = norm, layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


KNOBS = {
    "next_token_prediction": (objectives.next_token, {"published": True}),
    "prefix_language_modeling": (objectives.prefix_lm, {"prefix_fraction": "fraction"}),
    "copying": (objectives.copying, {}),
    "deshuffling": (objectives.deshuffling, {"percentage_to_shuffle": "rate"}),
    "infilling": (objectives.infilling, {"corruption_rate": "rate", "mean_tokens_per_span": "span"}),
    "autoencoding": (objectives.autoencoding, {"corruption_rate": "rate", "tokens_per_mask": "span"}),
    "selective_copying": (objectives.selective_copying, {"corruption_rate": "rate", "tokens_per_mask": "span"}),
}


def golden(case) -> dict[str, Tensor]:
    known = case.official_kwargs
    if "objective" in known:
        return transformed(known, case.meta["notes"].partition("input text: ")[2])
    if "samples" in known:
        samples = [objectives.Sample(*map(np.array, s), 0) for s in known["samples"]]
        row = pack(samples, known["sequence_length"], known["start_generating_id"])
        found = row._asdict() | {"label_ids": row.labels}
        return {name: torch.from_numpy(found[name]) for name in case.outputs}
    if "old_loss_vector" in case.inputs:
        return {"reward": reward(case.inputs["old_loss_vector"], case.inputs["new_loss_vector"])}
    if "dim" in known:
        layer = Masked(GatedSSM(known["dim"], known["state"], known["bidirectional"]))
        inputs = (case.inputs["x"], case.inputs["reset_mask"])
        return {"y": torch.func.functional_call(layer, add_prefix("layer.", case.params), inputs)}
    return case.run_official()


def transformed(known: dict, text: str) -> dict[str, Tensor]:
    """One objective on a text whose ids are its characters' code points."""
    known = dict(known)
    function, names = KNOBS[known.pop("objective")]
    rng, space = np.random.default_rng(known.pop("rng_seed")), known.pop("remaining_space")
    options = {k: v for k, v in names.items() if not isinstance(v, str)}
    options |= {ours: known[theirs] for theirs, ours in names.items() if theirs in known}
    if function is objectives.selective_copying:
        options |= {
            "before": (known["min_delimiter_prefix_length"], known["max_delimiter_prefix_length"]),
            "after": (known["min_delimiter_suffix_length"], known["max_delimiter_suffix_length"]),
            "query_first": known["format_style"] == "query_context",
            "whole_context": False,
        }
    made = function(encode(text), space, rng, encode, **options)
    return {"input_ids": torch.from_numpy(made.inputs), "label_ids": torch.from_numpy(made.labels)}


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]
