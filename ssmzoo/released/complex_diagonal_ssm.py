"""The complex diagonal SSMs of the SD-SSM project as released: four classes, told apart by their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.models.complex_diagonal_ssm import ComplexDiagonalModel
from ssmzoo.released.names import Names

MODELS = (ComplexDiagonalModel,)
ONE_LAYER = Names(("block.{rest}", "blocks.0.{rest}"), ("readout.{rest}", "mlps.0.{rest}"))


def official(
    state: dict[str, Tensor],
    *,
    output_size: int,
    input_size: int,
    state_size: int = 64,
    embed_size: int | None = None,
    num_layers: int | None = None,
    scale_eigv: float = 1.0,
    return_all_outputs: bool = False,
):
    """All four official classes, told apart by their keys. `init_state` may be complex or real with a last axis of 2.

    `return_all_outputs` is ignored, as the official models do; num_layers defaults to what the checkpoint holds.
    """
    del return_all_outputs
    renamed = {
        key: torch.view_as_complex(value.contiguous())
        if key.endswith("init_state") and not value.is_complex()
        else value
        for key, value in ONE_LAYER.to_ours(state).items()
    }
    layers = 1 + max(int(key.split(".")[1]) for key in renamed if key.startswith("blocks."))
    model = _OfficialComplexDiagonal(
        input_size,
        output_size,
        state_size,
        embed_size or renamed["embedding.weight"].shape[0],
        num_layers or layers,
        use_B="blocks.0.B_re" in renamed,
        readout="nonlinear" if "mlps.0.2.weight" in renamed else "linear",
        scale_eigv=scale_eigv,
    )
    return model, renamed


class _OfficialComplexDiagonal(ComplexDiagonalModel):
    """Official call: x (b l e) -> logits of the last step (b c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).logits[:, -1]


def to_official(
    module: ComplexDiagonalModel, state: dict[str, Tensor], num_layers: int | None = None
) -> dict[str, Tensor]:
    """The names of the class with num_layers layers; without the argument those of the classes of one, if it fits."""
    return ONE_LAYER.to_theirs(state) if num_layers is None and len(module.blocks) == 1 else dict(state)
