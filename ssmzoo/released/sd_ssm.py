"""SD-SSM as released: SDSSM and SDSSM_nonlinear. Our names are theirs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmzoo.models.sd_ssm import SDSSMModel, append_query_token

MODELS = (SDSSMModel,)


def official(
    state: dict[str, Tensor],
    *,
    output_size: int,
    input_size: int,
    state_size: int = 64,
    num_transition_matrices: int = 2,
    Lp_norm: float = 1.0,
    return_all_outputs: bool = False,
    mlp_size: int | None = None,
    embed_size: int | None = None,
):
    """SDSSM and, when the checkpoint has a two-layer readout, SDSSM_nonlinear (mlp_size defaults to state_size)."""
    del embed_size  # accepted and ignored by the official model
    nonlinear = "readout.0.weight" in state
    if nonlinear:
        mlp_size = state["readout.0.weight"].shape[0] if mlp_size is None else mlp_size
    model = _OfficialSDSSM(
        input_size,
        output_size,
        state_size,
        num_transition_matrices,
        Lp_norm,
        mlp_size if nonlinear else None,
        return_all_outputs=return_all_outputs,
    )
    return model, state


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
    model, state = official(dict(case.params), **case.official_kwargs)
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
