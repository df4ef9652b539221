"""The classifiers of the generalisation-bound paper as released: SentimentModel and MultiClassModel."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.probes.free_a_ssm import FreeAClassifier
from ssmzoo.released.names import Names

MODELS = (FreeAClassifier,)
BINARY = Names(("SSM.ssm.{rest}", "ssm.{rest}"), ("SSM.w", "W"))


def official(
    state: dict[str, Tensor],
    *,
    cls: str = "SentimentModel",
    vocab_size: int,
    embedding_size: int,
    N: int,
    s_A: float = 0.0,
    num_classes: int = 10,
    use_delta: bool = True,
    fix_sA: bool = False,
):
    """The released SentimentModel (binary) and MultiClassModel, distinguished by their keys."""
    binary = "W" not in state
    if cls not in ("SentimentModel", "MultiClassModel"):
        raise ValueError(f"cls is {cls!r}; expected 'SentimentModel' or 'MultiClassModel'")
    state = BINARY.to_ours(state) if binary else dict(state)
    model = FreeAClassifier(vocab_size, embedding_size, N, s_A, use_delta, fix_sA, None if binary else num_classes)
    if fix_sA:
        state.setdefault("ssm.A", model.ssm.A)
    return model, state


def to_official(module: FreeAClassifier, state: dict[str, Tensor], fix_sA: bool = False) -> dict[str, Tensor]:
    state = {key: value for key, value in state.items() if not (fix_sA and key == "ssm.A")}
    return BINARY.to_theirs(state) if module.W.ndim == 1 else state
