"""Golden arrays of the recall benches, in the published order of draws."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.data.recall import associative, copying
from ssmzoo.data.recall.draws import PublishedDraws

GENERATORS = {
    "multiquery_ar": lambda draws, n, length, k: associative.mqar(
        draws, n, length, k["num_kv_pairs"], k["vocab_size"], k["power_a"]
    ),
    "forgetting_mqar": lambda draws, n, length, k: associative.forgetting_mqar(
        draws, n, length, k["num_kv_pairs"], k["vocab_size"], k["num_updates"], avoid_replaced=False
    ),
    "compositional_mqar": lambda draws, n, length, k: associative.compositional_mqar(
        draws, n, length, k["num_kv_pairs"], k["vocab_size"]
    ),
    "disjoint_sets": lambda draws, n, _, k: associative.disjoint_sets(
        draws, n, k["short_length"], k["long_length"], k["vocab_size"]
    ),
    "parity": lambda draws, n, length, k: copying.parity(draws, n, length, 1),
    "majority": lambda draws, n, length, k: copying.majority(draws, n, length, 1),
    "cumulative_parity": lambda draws, n, length, k: copying.cumulative_parity(draws, n, length - 1, 1),
}


def golden(case) -> dict[str, Tensor]:
    """Inputs and labels of one case of family recall_data."""
    known = case.official_kwargs
    generator = GENERATORS[case.meta["official_class"].rpartition(".")[2]]
    draws = PublishedDraws(known["seed"])
    inputs, labels = generator(draws, known["num_examples"], known.get("input_seq_len"), known)
    return {"inputs": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}
