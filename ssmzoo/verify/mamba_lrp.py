"""MambaLRP: relevances of a classifier on Hugging Face's Mamba, and of a norm with a Vim mixer under chosen rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.layers.norm import RMSNorm
from ssmzoo.models.vim import VimMixer
from ssmzoo.probes.lrp_rules import rules
from ssmzoo.probes.mamba_lrp import relevance
from ssmzoo.released import mamba_hf
from ssmzoo.released.vim import mixer_arguments

NAMES = {"norm": "norm", "act": "act", "conv1d": "conv", "softplus": "softplus"}


def golden(case) -> dict[str, Tensor]:
    """A classifier on Hugging Face's Mamba explained, or a norm and a Vim mixer under chosen rules."""
    return _golden_mixer(case) if "mixer" in case.official_kwargs else _golden_lm(case)


def _golden_lm(case) -> dict[str, Tensor]:

    kwargs = case.official_kwargs
    classes = kwargs.pop("n_classes")
    head = {k.removeprefix("lm_head."): v for k, v in case.params.items() if k.startswith("lm_head.")}
    state = {k: v for k, v in case.params.items() if k not in ("lm_head.weight", "lm_head.bias")}
    model, state = mamba_hf.official(state, **kwargs, tie_word_embeddings=False)
    model.lm_head = nn.Linear(model.backbone.embedding.embedding_dim, classes, bias="bias" in head)
    model.load_state_dict(state | {f"lm_head.{k}": v for k, v in head.items()})
    model.eval()

    def last(x):
        return model(x).logits[:, -1]

    e, target = case.inputs["embeddings"], case.inputs["target"]
    lrp, plain = relevance(last, model, e, target), relevance(last, model, e, target, on=())
    return {
        "logits": lrp.logits,
        "relevance": lrp.relevance,
        "modified_gradient": lrp.gradient,
        "gradient_x_input": plain.relevance,
        "relevance_sum": lrp.relevance.sum(1),
        "selected_logit": lrp.logit,
    }


def _golden_mixer(case) -> dict[str, Tensor]:

    kwargs = case.official_kwargs
    mixer = dict(kwargs["mixer"])
    mixer["if_divide_out"] = mixer.pop("if_devide_out", False)
    mixer.setdefault("bimamba_type", "v2")
    detach = set(kwargs.get("params_to_detach", ("A", "B", "C", "z")))
    on = {"scan", *(NAMES[name] for name in kwargs.get("layer_transforms", ())), *(["gate"] if "z" in detach else [])}
    block = nn.Sequential()
    block.add_module("norm", RMSNorm(mixer["d_model"]))
    block.add_module("mixer", VimMixer(**mixer_arguments(mixer)[0]))
    with rules(on, detach - {"z"}, kwargs.get("gamma", 0.25)):
        return {"y": torch.func.functional_call(block, dict(case.params), (case.inputs["x"],))}
