"""The recurrent baselines of the SD-SSM project as released: ElmanRNN and LSTM. Our names are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmzoo.models.rnn import RNNModel
from ssmzoo.released.arguments import Arguments
from ssmzoo.released.sd_ssm import RUNNER, SWALLOWED

TELLING_KEYS = r"^rnn\.weight_hh_l0"
MODELS = (RNNModel,)


UNREAD = RUNNER | {
    **{"embed_size": (None, SWALLOWED), "num_transition_matrices": (2, SWALLOWED)},
    **{"Lp_norm": (1.0, SWALLOWED), "mlp_size": (None, SWALLOWED)},
}
SHARED = {"num_layers": 1, "return_all_outputs": False}
SIZES = ("output_size", "input_size", "state_size")
ONE_WAY = {"bidirectional": (False, "cannot run in the official model either: its projection expects one direction")}
ELMAN = Arguments("ElmanRNN", SHARED | {"nonlinearity": "relu"}, UNREAD, ONE_WAY, required=SIZES)
LSTM = Arguments("LSTM", SHARED, UNREAD | {"nonlinearity": ("relu", "of the other class")}, ONE_WAY, SIZES)
TABLES = (ELMAN, LSTM)


def official(state: dict[str, Tensor], **given):
    """ElmanRNN and LSTM, distinguished by the height of their gates."""
    gates = state.get("rnn.weight_hh_l0")
    lstm = gates is not None and len(gates) == 4 * gates.shape[1]
    config = (LSTM if lstm else ELMAN).complete(given)
    cell = "lstm" if lstm else config["nonlinearity"]
    sizes = (config["input_size"], config["output_size"], config["state_size"], config["num_layers"])
    model = _OfficialRNN(*sizes, cell)
    model.return_all_outputs = config["return_all_outputs"]
    return model, state


def infer(state: dict[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes; the nonlinearity has no weights."""
    if "rnn.weight_hh_l0" not in state:
        return {}
    last = next(value for key, value in reversed(state.items()) if not key.startswith("rnn.") and value.ndim == 2)
    inferred = {"state_size": state["rnn.weight_hh_l0"].shape[1], "input_size": state["rnn.weight_ih_l0"].shape[1]}
    layers = sum(key.startswith("rnn.weight_hh_l") for key in state)
    return inferred | {"num_layers": layers, "output_size": len(last)}


class _OfficialRNN(RNNModel):
    """Official call: x (b l e) -> logits of the last step (b c), or of every step (b l c)."""

    return_all_outputs = False

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x).logits
        return logits if self.return_all_outputs else logits[:, -1]
