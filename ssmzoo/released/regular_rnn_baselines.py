"""The recurrent baselines of the SD-SSM project as released: ElmanRNN and LSTM. Our names are theirs."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.models.rnn import RNNModel

MODELS = (RNNModel,)


def official(
    state: dict[str, Tensor],
    *,
    output_size: int,
    input_size: int,
    state_size: int,
    num_layers: int = 1,
    nonlinearity: str = "relu",
    embed_size: int | None = None,
    bidirectional: bool = False,
):
    """ElmanRNN and LSTM, told apart by the height of their gates."""
    del embed_size  # accepted and ignored by the official models
    if bidirectional:
        raise ValueError(
            "bidirectional=True cannot run in the official model either: its projection expects one direction"
        )
    lstm = state["rnn.weight_hh_l0"].shape[0] == 4 * state_size and state_size > 0
    return _OfficialRNN(input_size, output_size, state_size, num_layers, "lstm" if lstm else nonlinearity), state


class _OfficialRNN(RNNModel):
    """Official call: x (b l e) -> logits of the last step (b c)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).logits[:, -1]
