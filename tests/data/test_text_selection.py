"""Which part of a corpus is trained on: hashes and distances by hand, what stays, and what bad input says."""

import zlib

import numpy as np
import pytest

from ssmzoo.data import text_selection
from ssmzoo.data.text import TextData
from ssmzoo.data.text_corpus import FileCorpus
from ssmzoo.data.text_selection import SelectedCorpus, bucket, buckets, compressed, cut

WORDS = {
    "sea": "wave harbour sail captain storm anchor deck mast salt wind compass island".split(),
    "kitchen": "onion butter oven whisk flour pepper saucepan recipe simmer knife plate sugar".split(),
    "law": "court appeal statute clause verdict witness tribunal evidence contract plea judge jury".split(),
}


def prose(kind: str, words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS[kind], words)) + ".\n"


@pytest.fixture
def folder(tmp_path):
    """Thirty documents of three kinds, and a target of one of them."""
    (tmp_path / "corpus").mkdir()
    for i in range(30):
        kind = list(WORDS)[i % 3]
        (tmp_path / "corpus" / f"{i:02}_{kind}.txt").write_text(prose(kind, 300, i))
    (tmp_path / "target.txt").write_text(prose("kitchen", 900, 100))
    return tmp_path


def make(folder, **options):
    data = TextData(
        path=str(folder / "corpus"),
        seq_len=32,
        val_fraction=0.2,
        cache_dir=str(folder / "cache"),
        selection={"length": 1000, **options},
    )
    data.setup()
    return data


def test_buckets_of_n_grams():
    """SHA-256 of the words' UTF-8, modulo 10,000; the numbers are the authors' code's."""
    assert [bucket(g) for g in ("the", "cat", "sat", ".")] == [8288, 2366, 8505, 3960]
    assert buckets(["the", "cat", "sat", "."])[4:].tolist() == [143, 8294, 9081]


def test_pieces_are_about_as_long_as_each_other_and_lose_nothing():
    text = "".join(chr(97 + i % 26) for i in range(7345))
    for length in (200, 1000, 7000, 9000):
        parts = list(cut(iter([text[:10], text[10:5000], text[5000:]]), length))
        assert "".join(parts) == text
        assert all(len(p) == length for p in parts[:-1]) and len(parts[-1]) <= 1.5 * length


@pytest.mark.parametrize("method", ["dsir", "zip"])
def test_what_is_like_the_target_stays(folder, method):
    data = make(folder, target=str(folder / "target.txt"), method=method, share=0.3)
    text = data.decode(data.tokens("train"))
    counts = {kind: sum(text.count(w) for w in words) for kind, words in WORDS.items()}
    assert counts["kitchen"] > 0.95 * sum(counts.values())
    whole = TextData(path=str(folder / "corpus"), seq_len=32, val_fraction=0.2, cache_dir=str(folder / "cache"))
    assert np.array_equal(data.tokens("val"), whole.tokens("val"))
    assert 0.15 < len(data.tokens("train")) / len(whole.tokens("train")) < 0.4
    assert data.fingerprint != whole.fingerprint


def test_a_draw_keeps_the_share_and_depends_on_the_seed(folder):
    corpus = FileCorpus(str(folder / "corpus"))

    def chosen(seed):
        selection = SelectedCorpus(corpus, method="random", share=0.5, length=400, seed=seed)
        selection.identity(folder, 0.2)
        pieces = sum(1 for _ in selection.pieces(0.2))
        kept = ["".join(d.pieces) for d in selection.documents(0.2) if d.split == "train"]
        return kept, sum(len(k) for k in kept), pieces * 400

    first, size, whole = chosen(0)
    assert abs(size / whole - 0.5) < 0.1
    assert first == chosen(0)[0] != chosen(1)[0]


def test_alignment_is_the_mean_compression_distance(folder, monkeypatch):
    monkeypatch.setattr(text_selection, "EXAMPLES", 2)
    corpus = FileCorpus(str(folder / "corpus"))
    selection = SelectedCorpus(corpus, str(folder / "target.txt"), "zip", 0.3, 1500)
    selection.identity(folder, 0.2)
    scores = text_selection.by_compression(selection, 0.2)
    examples = list(selection.examples(0.2))
    examples = [examples[i * len(examples) // 2] for i in range(2)]
    piece = next(selection.pieces(0.2))

    def size(text):
        return len(zlib.compress(text.encode(), 6))

    distances = [(size(piece + e) - min(size(piece), size(e))) / max(size(piece), size(e)) for e in examples]
    assert np.isclose(scores[0], 1 - np.mean(distances))
    assert compressed(b"ab" * 500) < 40


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "gzip", "target": "x"}, "data.selection.method = 'gzip'; choose from dsir, zip, random"),
        ({"share": 1.0, "target": "x"}, "data.selection.share = 1.0 must lie between 0 and 1"),
        ({"share": 0.5}, "does nothing without data.selection.target"),
        ({"method": "random", "target": "x"}, "data.selection.target does nothing"),
        ({"method": "random", "length": 20}, "give 200 to 16,000 characters"),
        ({"targets": "x"}, "data.selection.targets is unknown; nearest: target"),
        ({"target": "no_such_file.txt"}, "does not exist"),
    ],
)
def test_bad_input(folder, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make(folder, **({"length": 2000} | options))


def test_pieces_too_short_to_be_judged(folder):
    with pytest.raises(ValueError, match="0 are long enough to be judged"):
        make(folder, target=str(folder / "target.txt"), length=200, share=0.5)
