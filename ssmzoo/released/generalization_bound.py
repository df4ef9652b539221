"""The classifiers of the generalisation-bound paper as released: SentimentModel and MultiClassModel."""

from __future__ import annotations

from torch import Tensor

from ssmzoo.models.free_a_ssm import FreeAClassifier

OFFICIAL = (("SSM.ssm.", "ssm."), ("SSM.w", "W"))


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
    """The released SentimentModel (binary) and MultiClassModel, told apart by their keys."""
    binary = "W" not in state
    if cls not in ("SentimentModel", "MultiClassModel"):
        raise ValueError(f"cls is {cls!r}; expected 'SentimentModel' or 'MultiClassModel'")
    for old, new in OFFICIAL:
        state = {key.replace(old, new) if key.startswith(old) else key: value for key, value in state.items()}
    model = FreeAClassifier(vocab_size, embedding_size, N, s_A, use_delta, fix_sA, None if binary else num_classes)
    if fix_sA:
        state.setdefault("ssm.A", model.ssm.A)
    return model, state
