"""Decoding by a step with fixed addresses: the text of plain calls, for every model whose state keeps its shape.

Without a GPU the graph is replaced by plain calls of what would be recorded.
"""

import pytest
import torch
from test_state_contract import NODES, VOCAB, tiny_model

from ssmzoo.inference import decoding as module
from ssmzoo.inference.captured import StaticStep, advance_into, plain_calls, why_not_static
from ssmzoo.inference.generate import generate


@pytest.fixture
def recorded(monkeypatch):
    """The steps that were recorded, each under its model."""
    made = []

    class Watched(StaticStep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "StaticStep", Watched)
    monkeypatch.setitem(module.RECORD, "cpu", plain_calls)
    return made


@pytest.mark.parametrize("name", [n for n in NODES if ":" not in n])
def test_greedy_text_is_that_of_plain_calls(name, recorded, monkeypatch):
    model = tiny_model(name, torch.float32)
    prompts = [torch.randint(VOCAB, (5,), generator=torch.Generator().manual_seed(3))]
    got = generate(model, prompts, 8, greedy=True, vocab_size=VOCAB)
    steps = len(recorded)
    monkeypatch.delitem(module.RECORD, "cpu")
    assert got == generate(model, prompts, 8, greedy=True, vocab_size=VOCAB)
    with torch.no_grad():
        first = model(prompts[0][None]).state
        second = model(prompts[0][None, :1], first).state
    assert steps == (why_not_static(model, first, second) is None)
    if name in ("mamba", "mamba2", "sd_ssm", "falcon_mamba", "moe_mamba"):
        assert steps == 1


def test_sampling_stops_penalties_and_several_prompts(recorded, monkeypatch):
    model = tiny_model("mamba", torch.float32)
    prompts = [[1, 2, 3], [4, 5], [6]]
    options = dict(seed=1, temperature=0.9, top_k=9, repetition_penalty=1.2, stop_tokens=(7, 11, 3))
    got = generate(model, prompts, 12, **options)
    assert recorded and got == [*map(list, got)]
    monkeypatch.delitem(module.RECORD, "cpu")
    assert got == generate(model, prompts, 12, **options)
    moe = tiny_model("moe_mamba", torch.float32)
    monkeypatch.setitem(module.RECORD, "cpu", plain_calls)
    recorded.clear()
    generate(moe, prompts, 3, greedy=True)
    assert not recorded  # rows that have ended would take places with the experts of others


def test_what_cannot_be_recorded_is_said_and_goes_on(monkeypatch):
    def refuse(run, undo):
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    model = tiny_model("mamba", torch.float32)
    expected = generate(model, [[1, 2]], 5, greedy=True)
    monkeypatch.setitem(module.RECORD, "cpu", refuse)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: operation not permitted when stream is capturing$"):
        assert generate(model, [[1, 2]], 5, greedy=True) == expected


def test_states_are_copied_over_whatever_they_are_made_of():
    old = {"a": torch.arange(3.0), "b": [torch.zeros(3)], "n": 1}
    new = {"a": old["b"][0], "b": [old["a"]], "n": 1}  # each in the other's place
    advance_into(old, new)
    assert old["a"].tolist() == [0, 0, 0] and old["b"][0].tolist() == [0, 1, 2]
    model = torch.nn.Linear(1, 1)
    assert why_not_static(model, old, old) is None
    assert "grows" in why_not_static(model, old, {**old, "a": torch.zeros(4)})
    assert "numbers" in why_not_static(model, old, {**old, "n": 2})


def test_nan_is_refused_in_words(recorded):
    model = tiny_model("mamba", torch.float32)
    weight = model.backbone.norm_f.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="logits are NaN"):
            generate(model, [[1]], 3)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
