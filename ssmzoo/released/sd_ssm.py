"""SD-SSM as released: SDSSM and SDSSM_nonlinear. Our names are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.models.sd_ssm import SDSSMModel, append_query_token
from ssmzoo.released.arguments import Arguments

TELLING_KEYS = r"block\.A_dict"
MODELS = (SDSSMModel,)


SWALLOWED = "swallowed by the class"
RUNNER = {  # what the project's runner gives to every one of its classes
    **{"task": (None, SWALLOWED), "norm_type": ("layernorm", SWALLOWED), "mlp_size_mult": (1, SWALLOWED)},
    **{"prenorm": (True, SWALLOWED), "max_seq_len": (500, SWALLOWED)},
}
SHARED = {
    **{"num_transition_matrices": 2, "Lp_norm": 1.2, "return_all_outputs": False},
}
UNREAD = RUNNER | {
    **{"embed_size": (None, SWALLOWED), "num_layers": (1, SWALLOWED), "nonlinearity": ("relu", SWALLOWED)},
    "mlp_multiplier": (1, "handed on and not read there"),
}
DEBUG = {"debug": (False, "the outputs before the readout are not returned here")}
SIZES = ("output_size", "input_size", "state_size")
LINEAR = Arguments("SDSSM", SHARED, UNREAD | {"mlp_size": (None, "of the two-layer readout")}, DEBUG, SIZES)
NONLINEAR = Arguments("SDSSM_nonlinear", SHARED | {"mlp_size": None}, UNREAD, DEBUG, SIZES)
TABLES = (LINEAR, NONLINEAR)


def official(state: dict[str, Tensor], **given):
    """SDSSM and, when the checkpoint has a two-layer readout, SDSSM_nonlinear (mlp_size defaults to state_size)."""
    nonlinear = "readout.0.weight" in state
    config = (NONLINEAR if nonlinear else LINEAR).complete(given)
    model = _OfficialSDSSM(
        config["input_size"],
        config["output_size"],
        config["state_size"],
        config["num_transition_matrices"],
        config["Lp_norm"],
        (config["mlp_size"] or config["state_size"]) if nonlinear else None,
        return_all_outputs=config["return_all_outputs"],
    )
    return model, state


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes; the norm's exponent has no weights."""
    if "block.A_dict" not in state:
        return {}
    last = "readout.2.weight" if "readout.0.weight" in state else "readout.weight"
    inferred = {"state_size": len(state["block.A_dict"]), "num_transition_matrices": state["block.A_dict"].shape[-1]}
    inferred |= {"input_size": state["block.B.weight"].shape[1], "output_size": len(state[last])}
    return inferred | ({"mlp_size": len(state["readout.0.weight"])} if "readout.0.weight" in state else {})


class _OfficialSDSSM(SDSSMModel):
    """Official call: x (b l e) -> logits of the last step (b c), or of every step (b l c)."""

    def __init__(self, *args, return_all_outputs: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.return_all_outputs = return_all_outputs

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.block(x, all_steps=self.return_all_outputs)
        y = self.readout(self.norm(h))
        return y if self.return_all_outputs else y[:, -1]


def golden(case) -> dict[str, Tensor]:
    """Forward cases, and recorded training steps (Adam on batches given without their query token)."""
    if case.meta.get("kind") != "training_trajectory":
        return case.run_official()
    recipe = case.meta["training"]
    model, state = case.build()
    model.load_state_dict(state)
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=recipe["lr"],
        betas=tuple(recipe["betas"]),
        eps=recipe["eps"],
        weight_decay=recipe["weight_decay"],
    )
    history: dict[str, list[Tensor]] = {"loss": [], "accuracy": [], "grad_norm_before_clip": []}
    for i in range(recipe["steps"]):
        x, target = case.inputs[f"step{i}/x"].detach(), case.inputs[f"step{i}/target"]
        logits = model(append_query_token(x) if recipe["use_query_token"] else x)
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe["max_grad_norm"])
        optimizer.step()
        values = (loss.detach(), (logits.argmax(-1) == target).float().mean(), norm)
        for key, value in zip(history, values):
            history[key].append(value)
    return {k: torch.stack(v) for k, v in history.items()} | {
        f"param_after/{k}": v.detach() for k, v in model.state_dict().items()
    }
