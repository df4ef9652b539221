"""Recall benches: published arrays bit for bit, what every label means, and what bad sizes say."""

import json
import types

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ssmzoo.data.recall import associative, copying, lookup
from ssmzoo.data.recall.benches import BENCHES
from ssmzoo.data.recall.data import RecallData
from ssmzoo.data.recall.draws import Draws, PublishedDraws
from ssmzoo.released.golden import GoldenCase
from ssmzoo.verify import recall_data
from tests.paths import GOLDEN

CASES = sorted((GOLDEN / "recall_data").glob("*.json"))
TEXT = "".join(f"line {i} of a text without the facts\n" for i in range(2000))


@pytest.fixture
def made(tmp_path):
    """A RecallData of any bench, whose needles are hidden in a small text."""
    (tmp_path / "hay.txt").write_text(TEXT)

    def make(bench, **arguments):
        hay = {"haystack": str(tmp_path / "hay.txt")} if bench == "needle" else {}
        return RecallData(bench, **hay | {"batch_size": 8, "val_samples": 8, "test_samples": 8} | arguments)

    return make


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSMZOO_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_published_arrays_bit_for_bit(file):
    expected = load_file(file.with_suffix(".safetensors"))
    got = recall_data.golden(GoldenCase.load(file))
    assert len(CASES) == 8
    for name in ("inputs", "labels"):
        assert np.array_equal(got[name].numpy(), expected[f"output/{name}"])
        assert json.loads(file.read_text())["outputs"] == ["inputs", "labels"]


def last_value(inputs, at, start, keys=1):
    """What stood behind the last occurrence in the context of the key that is asked for."""
    key = inputs[at - keys + 1 : at + 1].tolist()
    step = keys + 1
    positions = [i for i in range(0, start, step) if inputs[i : i + keys].tolist() == key]
    return inputs[positions[-1] + keys]


@pytest.mark.parametrize("draws", [Draws(3), PublishedDraws(3)], ids=["vectorised", "published"])
@pytest.mark.parametrize("fill", [False, True])
def test_every_question_has_the_answer_of_the_context(draws, fill):
    for name, make, start, keys, options in (
        ("mqar", associative.mqar, 16, 1, {}),
        ("forgetting_mqar", associative.forgetting_mqar, 22, 1, {"updates": 3}),
        ("compositional_mqar", associative.compositional_mqar, 27, 2, {}),
    ):
        pairs = 9 if keys == 2 else 8
        inputs, labels = make(draws, 20, 96, pairs, 120, random_fillers=fill, **options)
        assert inputs.shape == labels.shape == (20, 96) and (labels[:, :start] == -100).all(), name
        for row, label in zip(inputs, labels):
            asked = np.flatnonzero(label != -100)
            assert len(asked) == pairs
            assert all(label[at] == last_value(row, at, start, keys) for at in asked), name
            assert len({tuple(row[at - keys + 1 : at + 1]) for at in asked}) == pairs
        assert ((inputs == 0).sum() < 20) == fill


def test_updates_differ_from_what_they_replace():
    inputs, _ = associative.forgetting_mqar(Draws(0), 500, 36, 4, 20, updates=4)
    for row in inputs:
        first = dict(zip(row[0:8:2], row[1:8:2]))
        assert all(first[k] != v for k, v in zip(row[8:16:2], row[9:16:2]))


def test_short_distances_are_likely_in_both_orders_of_drawing():
    means = []
    for draws in (Draws(1), PublishedDraws(1)):
        slots = draws.slots(4000, 50, 4, 0.01)
        assert all(len(set(row)) == 4 for row in slots.tolist())
        means.append(slots.mean(0))
    assert np.allclose(*means, atol=1.0) and means[0][0] < means[0][3]


def test_sets_share_exactly_the_token_asked_for():
    for draws in (Draws(2), PublishedDraws(2)):
        inputs, labels = associative.disjoint_sets(draws, 50, 6, 14, 64)
        for row, label in zip(inputs, labels):
            a, b = row[1:7], row[8:22]
            assert (
                set(a) & set(b) == {label[-1]} and (label[:-1] == -100).all() and row[[0, 7, 22]].tolist() == [1, 2, 3]
            )


def test_copying_and_induction_and_bits():
    inputs, labels = copying.selective_copying(Draws(0), 30, 40, 8, 16)
    for row, label in zip(inputs, labels):
        content = row[:32]
        assert content[content > 0].tolist() == label[32:].tolist() and (row[32:] == 15).all()
    inputs, labels = copying.induction_heads(Draws(0), 200, 12, 1, 16)
    for row, label in zip(inputs, labels):
        positions = np.flatnonzero(row == 15)
        assert len(positions) == 2 and positions[1] == 11 and label[-1] == row[positions[0] + 1]
    bits, labels = copying.cumulative_majority(Draws(0), 30, 9, 1)
    assert np.array_equal(labels, [[2 * row[: i + 1].sum() >= i + 1 for i in range(9)] for row in bits])
    bits, labels = copying.cumulative_parity(Draws(0), 30, 9, 1)
    assert np.array_equal(labels[:, -1], bits.sum(1) % 2)


def test_phone_numbers_and_hidden_facts_can_be_looked_up():
    inputs, labels = lookup.phone_book(Draws(0), 20, 6, 3)
    for row, label in zip(inputs, labels):
        text = bytes(row.astype(np.uint8)).decode()
        head, book = text.split("Phonebook:\n")
        asked = head.removeprefix("Numbers of ").removesuffix("?\n").split(", ")
        numbers = dict(line.split(": ") for line in book.splitlines()[:6])
        assert len(numbers) == 6 and book.splitlines()[6] + "\n" == head
        assert bytes(label[label > 0].astype(np.uint8)).decode() == "".join(numbers[n] for n in asked).replace("-", "")
    inputs, labels = lookup.needle(Draws(0), 40, 400, 3, np.frombuffer(TEXT.encode(), np.uint8))
    for row, label in zip(inputs, labels):
        text = bytes(row.astype(np.uint8)).decode()
        facts, end = text.split("\nThe number of ")[1:4], text.split("\nThe number of ")[4]
        found = {f[:6]: f[10:15] for f in facts}
        assert len(found) == 3 and text.count(".\n") == 3
        assert bytes(label[label > 0].astype(np.uint8)).decode() == found[end[:6]] and inputs.shape == (40, 400)


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_draws_its_usual_sizes(made, bench):
    data = made(bench)
    tokens = data.sizes["vocab_size"]
    for number in range(6):
        batch, again = data.training_batch(number), data.training_batch(number)
        assert all(torch.equal(batch[key], again[key]) for key in batch)
        assert batch["input_ids"].shape == batch["labels"].shape and len(batch["labels"]) == 8
    seen = {tuple(batch["case"][0].tolist()) for batch in data.test_batches()}
    assert seen == set(BENCHES[bench].test) and set(BENCHES[bench].train) <= seen
    for batch in [*data.val_dataloader(), *data.test_batches(), data.training_batch(0)]:
        asked = batch["labels"] != -100
        assert batch["input_ids"].min() >= 0 and batch["input_ids"].max() < tokens and asked.any(1).all()
        assert batch["labels"][asked].min() >= 0 and batch["labels"].max() < tokens
        assert len(torch.unique(asked.sum(1))) == 1  # so that the mean over positions is one over examples
    other = made(bench, seed=1)
    assert not torch.equal(other.training_batch(0)["input_ids"], data.training_batch(0)["input_ids"])


def test_training_resumes_exactly_and_ranks_draw_apart(made):
    loader = made("mqar").train_dataloader()
    batches = [batch for _, batch in zip(range(5), loader)]
    again = made("mqar").train_dataloader()
    again.load_state_dict({"position": 3})
    assert torch.equal(next(iter(again))["input_ids"], batches[3]["input_ids"])
    data = made("mqar")
    data.trainer = types.SimpleNamespace(global_rank=1, world_size=2, state=types.SimpleNamespace(fn="fit"))
    assert torch.equal(next(iter(data.train_dataloader()))["input_ids"], batches[1]["input_ids"])
    data.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="had data seed = 7, now it is 0"):
        data.load_state_dict(data.state_dict() | {"seed": 7})


def test_curricula(made):
    cases = [[32, 4], [64, 8], [96, 8]]
    data = made("mqar", train=cases, curriculum="increasing", curriculum_steps=3)
    lengths = [data.training_batch(i)["input_ids"].shape[1] for i in range(9)]
    assert lengths == [32] * 3 + [64] * 3 + [96] * 3
    mixed = made("mqar", train=cases)
    assert {mixed.training_batch(i)["input_ids"].shape[1] for i in range(40)} == {32, 64, 96}
    often = made("mqar", train=[[32, 4]] * 9 + [[64, 8]])
    assert sum(often.training_batch(i)["input_ids"].shape[1] == 32 for i in range(300)) > 240
    assert len(often.val_dataloader()) == 2


@pytest.mark.parametrize("arguments, words", [
    ({"bench": "mqr"}, "data.bench = 'mqr'; nearest: mqar"),
    ({"train": [[16, 8]]}, r"data.train holds \[length, pairs\] = \[16, 8\]: 8 pairs need a length of at least 32"),
    ({"test": [[64, 16]], "vocab_size": 30}, "data.test holds .*16 pairs need data.vocab_size of at least 34"),
    ({"bench": "compositional_mqar", "train": [[64, 5]]}, "5 pairs are no square"),
    ({"bench": "compositional_mqar", "train": [[20, 4]]}, "length of at least 24"),
    ({"bench": "disjoint_sets", "vocab_size": 20}, "need data.vocab_size of at least 24"),
    ({"bench": "selective_copying", "train": [[10, 8]]}, "8 tokens to copy need a length of at least 16"),
    ({"bench": "induction_heads", "train": [[32, 2]]}, r"give \[length, 1\]"),
    ({"bench": "parity", "vocab_size": 5}, "parity has 3 tokens"),
    ({"bench": "phone_book", "train": [[40, 33]]}, "ask for 1 to 32"),
    ({"bench": "phone_book", "train": [[4, 5]]}, "5 numbers of 4 entries"),
    ({"bench": "needle", "train": [[64, 1]]}, "1 facts need a length of at least"),
    ({"bench": "forgetting_mqar", "updates": 9}, "data.updates = 9 must lie between 1 and the number of pairs"),
    ({"updates": 2}, "data.updates does nothing for data.bench=mqar; it belongs to forgetting_mqar"),
    ({"bench": "parity", "power": 0.1}, "data.power does nothing"),
    ({"power": -1.0}, "data.power = -1"),
    ({"train": []}, "data.train is empty"),
    ({"train": [[64]]}, r"data.train holds \[64\]; give \[\[length, pairs\], ...\]"),
    ({"train": [[64, -4]]}, "positive whole numbers"),
    ({"curriculum": "rising"}, "choose one of mixed, increasing"),
    ({"batch_size": 0}, "data.batch_size = 0"),
])  # fmt: skip
def test_bad_sizes_are_explained(arguments, words):
    with pytest.raises(ValueError, match=words):
        RecallData(**arguments)


@pytest.mark.parametrize("bench", BENCHES)
def test_the_least_sizes_that_are_allowed_can_be_drawn(bench, made):
    make, found = BENCHES[bench], 0
    for a in range(1, 90):
        for b in range(1, 5):
            vocab = make.vocab if make.fixed else 14
            if make.least(a, b, vocab) is None and found < 40:
                inputs, labels = made(bench, vocab_size=vocab, train=[[a, b]], test=[[a, b]], **(
                    {"updates": 1} if bench == "forgetting_mqar" else {})).draw(Draws(0), 4, (a, b))  # fmt: skip
                assert inputs.shape == labels.shape and (labels != -100).any()
                found += 1
    assert found > 0
