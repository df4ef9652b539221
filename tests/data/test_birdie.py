"""Birdie's objectives, packing and mixtures: invariants of every objective, rows without leaks, bad input."""

import numpy as np
import pytest
import torch

from ssmzoo.data.birdie.data import BirdieData
from ssmzoo.data.birdie.mixtures import MIXTURES, configurations
from ssmzoo.data.birdie.objectives import Sample
from ssmzoo.data.birdie.packing import IGNORE, pack

TEXT = "".join(f"line {i} says {i * 7919 % 1000} and {i * 104729 % 977}\n" for i in range(4000))
ALL = {c.name: c for make in MIXTURES.values() for c in make()}
every_objective = pytest.mark.parametrize("name", ALL)


def encode(text):
    return [ord(c) for c in text]


def decode(ids):
    return "".join(map(chr, ids))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return {"path": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache")}


@every_objective
@pytest.mark.parametrize("space", [300, 512, 1000])
def test_samples_fit_and_follow_from_their_input(name, space):
    objective, tokens = ALL[name], encode(TEXT[:space])
    for seed in range(5):
        made = objective.make(tokens, space, np.random.default_rng(seed), encode)
        again = objective.make(tokens, space, np.random.default_rng(seed), encode)
        assert made is not None and len(made.inputs) + len(made.labels) <= space and 0 < made.used <= len(tokens)
        assert all(np.array_equal(a, b) for a, b in zip(made, again))
        inputs, labels, used = decode(made.inputs), decode(made.labels), decode(tokens[: made.used])
        kind = objective.kind
        if kind in ("next_token", "copying", "deshuffling") or kind.startswith("autoencoding"):
            assert labels == used
        if kind == "copying":
            assert inputs == "<|COPY|>" + labels
        if kind == "prefix_lm":
            assert inputs.removeprefix("<|PREFIX LM|>") + labels == used
        if kind == "deshuffling":
            assert sorted(inputs.removeprefix("<|DESHUFFLE|>")) == sorted(labels) and labels not in inputs
        if kind == "infilling":
            for number, piece in enumerate(labels.split(" [[mask_")[1:]):
                inputs = inputs.replace(f" [[mask_{number}]]", piece.partition("]]")[2], 1)
            assert inputs == "<|INFILL|>" + used
        if kind == "autoencoding_deshuffling":
            kept = [piece.split("]]")[-1] for piece in inputs.partition("|>")[2].split(" [[mask_")]
            assert len("".join(kept)) < len(used) and all(piece in used for piece in kept)
        if kind == "selective_copying":
            context = inputs.partition("[ctx]\n")[2].partition("\n[/ctx]")[0]
            questions = [q.partition("]\n")[2].partition("\n[/find")[0] for q in inputs.split("[find ")[1:]]
            answers = [a.partition("]\n")[2].removesuffix("\n\n") for a in labels.removesuffix("[done]").split("[res ")]
            for question, answer in zip(questions, answers[1:], strict=True):
                before, after = question.split("\n[sep]\n")
                assert before + answer + after in context, (question, answer)


@every_objective
def test_without_room_there_is_no_sample(name):
    for tokens, space in (([], 400), (encode(TEXT[:2000]), 3), (encode("a"), 12)):
        made = ALL[name].make(tokens, space, np.random.default_rng(0), encode)
        assert made is None or len(made.inputs) + len(made.labels) <= space


def test_packing_shows_no_label_to_its_own_input():
    samples = [Sample(np.array([5, 6, 7]), np.array([8, 9]), 0), Sample(np.array([4]), np.array([3, 3, 3]), 0)]
    row = pack(samples, 12, 2)
    assert row.input_ids.tolist() == [5, 6, 7, 2, 8, 4, 2, 3, 3, 0, 0, 0]
    assert row.labels.tolist() == [*[IGNORE] * 3, 8, 9, IGNORE, 3, 3, 3, *[IGNORE] * 3]
    assert row.prefix.tolist() == [True] * 4 + [False] + [True] * 2 + [False] * 5
    with pytest.raises(ValueError, match="must fit"):
        pack(samples, 8, 2)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_batches_follow_from_seed_number_and_weights(mixture, text):
    data = [BirdieData(mixture, seq_len=400, batch_size=3, **text) for _ in range(2)]
    for d in data:
        d.setup()
    first, second = (d.training_batch(7) for d in data)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert set(first) == {"input_ids", "labels", "seq_idx", "prefix"} and first["input_ids"].shape == (3, 400)
    inside, asked = first["prefix"], first["labels"] != IGNORE
    starts = inside & asked  # the start tokens: the only positions that are in a prefix and answer
    assert (first["input_ids"][starts] == data[0].start_id).all() and starts.sum() >= 3
    assert not torch.equal(data[0].training_batch(8)["input_ids"], first["input_ids"])
    assert len(data[0].val_dataloader()) == len(data[0].names)
    if len(data[0].names) > 1:
        data[0].set_weights([1.0] + [0.0] * (len(data[0].names) - 1))
        assert not torch.equal(data[0].training_batch(7)["input_ids"], first["input_ids"])


def test_the_weights_decide_what_is_drawn(text):
    data = BirdieData("birdie", seq_len=400, batch_size=8, **text)
    data.setup()
    data.set_weights([float(name == "copying") for name in data.names])
    ids = torch.cat([data.training_batch(i)["input_ids"] for i in range(4)])
    assert all(data.decode(row.tolist()).startswith("<|COPY|>") for row in ids)


def test_a_learnt_vocabulary_gets_a_start_token_of_its_own(text):
    data = BirdieData("ul2", tokenizer="bpe", bpe_vocab_size=300, seq_len=256, **text)
    data.setup()
    assert data.start_id == data.tokenizer.vocab_size == data.sizes["vocab_size"] - 1
    assert (data.training_batch(0)["input_ids"] == data.start_id).any()


def test_text_stays_on_its_side(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(chr(97 + i) * 3000)
    data = BirdieData("next_token", path=str(tmp_path), seq_len=64, cache_dir=str(tmp_path / "cache"), val_fraction=0.2)
    data.setup()
    marker = set(data.encode("<|NTP|>"))
    letters = {side: set() for side in ("train", "val")}
    for i in range(40):
        letters["train"] |= set(data.training_batch(i)["labels"].unique().tolist())
    for batch in data.val_dataloader():
        letters["val"] |= set(batch["labels"].unique().tolist())
    assert not (letters["train"] & letters["val"]) - {IGNORE} - marker


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mixture": "bride"}, "data.mixture = 'bride'.*did you mean.*birdie|data.mixture = 'bride'.*choose one of"),
        ({"objectives": [{"objective": "infiling"}]}, "infiling.*infilling"),
        ({"objectives": [{"objective": "copying", "rate": 0.5}]}, "copying has no rate"),
        ({"objectives": [{"objective": "infilling", "rate": 1.5}]}, "rate = 1.5; it must be between 0 and 1"),
        ({"objectives": [{"objective": "infilling", "span": 0}]}, "span = 0; it must be at least 1"),
        ({"objectives": [{"objective": "selective_copying", "before": [4, 2]}]}, "before = .4, 2.; give"),
        ({"objectives": [{"rate": 1}]}, "data.objectives is a list such as"),
        ({"objectives": [{"objective": "copying"}, {"objective": "copying"}]}, "must differ"),
        ({"mixture": "ul2", "objectives": [{"objective": "copying"}]}, "goes with data.mixture=birdie or fixed"),
        ({"shortest": 900}, "data.shortest = 900"),
        ({"val_rows": 0}, "data.val_rows = 0"),
        ({"seq_len": 64}, "selective_copying.*found no text and room in a row of data.seq_len = 64"),
    ],
)
def test_bad_input_is_named(arguments, message, text):
    with pytest.raises(ValueError, match=message):
        BirdieData(**{"seq_len": 400, **text, **arguments}).setup()


def test_the_mixtures_are_the_papers():
    assert len(configurations("birdie", None)) == 16
    assert len({c.kind for c in configurations("birdie", None)}) == 8
    assert [c.weight for c in configurations("ul2", None)] == [0.6, 0.2, 0.1, 0.1]
    assert all(len({c.name for c in make()}) == len(make()) for make in MIXTURES.values())
