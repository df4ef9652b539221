"""Labels, states and fixed sets of regular languages, against the official samplers."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from ssmzoo.data.automata import Automaton
from ssmzoo.data.automata_library import automaton, word_problem
from ssmzoo.data.formal_protocols import FixedSet


def golden(case) -> dict[str, Tensor]:
    """Labels and states that the official samplers gave, transition tables, and the fixed sets sample by sample."""
    kind = case.meta.get("kind")
    if kind is None and "delta" in case.meta:
        _same_automaton(automaton(case.name.removeprefix("automaton_")), case.meta)
        return {}
    if kind == "token_id_task_data":
        return _fixed_set_outputs(case)
    language = word_problem(case.meta["group"]) if kind == "token_level_task_data" else automaton(case.meta["case"])
    outputs = {}
    for name, ids in case.inputs.items():
        states = language.run(ids.numpy())
        outputs[f"states_{name}"] = torch.from_numpy(states)
        labels = language.output[states]
        outputs[f"target_{name}"] = torch.from_numpy(labels if kind == "token_level_task_data" else labels[:, -1])
    return outputs


def _same_automaton(ours: Automaton, table: dict) -> None:
    for key, value in (
        ("delta", ours.delta.tolist()),
        ("output", ours.output.tolist()),
        ("initial_state", ours.initial_state),
        ("num_classes", ours.num_classes),
        ("symbols", list(ours.symbols)),
        ("state_names", list(ours.state_names)),
        ("element_names", list(ours.state_names)),
    ):
        if key in table and table[key] != value:
            raise ValueError(f"automaton {ours.name}: {key} differs from the official one")


def _fixed_set_outputs(case) -> dict[str, Tensor]:
    name, outputs = case.meta["case"].removeprefix("fixedset_"), {}
    for split, seed in case.meta["dataset_seeds"].items():
        expected, lengths = case.inputs[split], case.inputs[f"{split}_length"]
        fixed = FixedSet(name, *case.meta["lengths"][split])
        labels = []
        for i, (ids, label) in enumerate(islice(fixed.samples(seed), len(expected))):
            if len(ids) != lengths[i] or not torch.equal(ids, expected[i, : len(ids)]):
                raise ValueError(f"{case.name}: sample {i} of {split} is not the official one")
            labels.append(label)
        outputs[f"{split}_target"] = torch.tensor(labels)
    return outputs
