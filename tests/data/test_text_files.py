"""Files of the field's formats by suffix: every kind of record, every compression, and what bad ones say."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import sys
import types

import numpy as np
import pytest
import zstandard

from ssmzoo.data import text_corpus, text_files
from ssmzoo.data.text import TextData
from ssmzoo.data.text_files import COMPRESSIONS, RECORDS
from ssmzoo.data.text_tokenizer import END_TOKENS, JsonTokenizer, from_dict, train_bpe

TEXTS = [f'Zażółć gęślą {i}.\nSecond line, with "quotes"\tand a tab.' for i in range(400)]
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE), ".zst": zstandard.compress}  # fmt: skip


def encoded(kind, field="text"):
    if kind in (".jsonl", ".ndjson"):
        return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(TEXTS)).encode()
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter="\t" if kind == ".tsv" else ",")
    writer.writerows([["id", field], *([i, t] for i, t in enumerate(TEXTS))])
    return out.getvalue().encode()


def documents(data):
    return {split: [data.decode(side.tokens[a:b]) for a, b in itertools.pairwise(side.starts)]
            for split, side in (("train", data._side("train")), ("val", data._side("val")))}  # fmt: skip


@pytest.fixture
def fake_parquet(monkeypatch):
    """pyarrow's reader, of a file of JSON lines."""

    class ParquetFile:
        def __init__(self, path):
            self.rows = [json.loads(line) for line in open(path)]
            self.schema_arrow = types.SimpleNamespace(names=list(self.rows[0]))

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def iter_batches(self, batch_size, columns):
            values = [row[columns[0]] for row in self.rows]
            for start in range(0, len(values), 100):
                column = types.SimpleNamespace(to_pylist=lambda start=start: values[start : start + 100])
                yield types.SimpleNamespace(column=lambda i, column=column: column)

    module = types.ModuleType("pyarrow")
    module.parquet = types.SimpleNamespace(ParquetFile=ParquetFile)
    monkeypatch.setitem(sys.modules, "pyarrow", module)


MARKS = {"plain": b"", "marked": b"\xef\xbb\xbf"}  # a byte-order mark, which files that are no text do not have
KINDS = [(kind, "plain") for kind in (*RECORDS, ".txt")]
KINDS += [(kind, "marked") for kind, _ in KINDS if kind not in (".parquet", ".pq")]


@pytest.mark.parametrize("packed", ["", *COMPRESSIONS])
@pytest.mark.parametrize("kind, mark", KINDS)
def test_every_kind_and_compression_gives_the_same_documents(tmp_path, kind, packed, mark, fake_parquet):
    parquet = kind in (".parquet", ".pq")
    content = MARKS[mark] + (
        encoded(".jsonl") if parquet else "\n".join(TEXTS).encode() if kind == ".txt" else encoded(kind)
    )
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK.get(packed, bytes)(content))
    data = TextData(path=str(path), seq_len=16, batch_size=2, val_fraction=0.1, cache_dir=str(tmp_path / "cache"))
    if parquet and packed:
        with pytest.raises(ValueError, match="compressed inside; unpack it"):
            data.setup()
        return
    found = documents(data)
    if kind == ".txt":
        assert "".join(found["train"] + found["val"]) == "\n".join(TEXTS)
        return
    assert sorted(found["train"] + found["val"]) == sorted(TEXTS) and 20 < len(found["val"]) < 60
    assert found["train"] == [t for t in TEXTS if t in set(found["train"])]  # in the file's order


def test_sides_of_records_follow_from_their_text_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(encoded(".jsonl"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "part.csv.gz").write_bytes(gzip.compress(encoded(".csv")))
    (tmp_path / "b" / "notes.txt").write_text("plain text beside it\n" * 40)
    a, b = (
        TextData(path=str(tmp_path / n), seq_len=16, val_fraction=0.1, cache_dir=str(tmp_path / "c"))
        for n in ("a.jsonl", "b")
    )
    assert set(documents(a)["val"]) <= set(documents(b)["val"])


@pytest.mark.parametrize("count", [2, 3, 7, 400])
def test_few_records_leave_some_on_each_side(tmp_path, count, monkeypatch):
    rows = [json.dumps({"body": f"{i} " * 50}) for i in range(count)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    data = TextData(path=str(tmp_path / "a.jsonl"), text_field="body", seq_len=8, cache_dir=str(tmp_path))
    found = documents(data)
    assert len(found["train"]) + len(found["val"]) == count and 1 <= len(found["val"]) <= max(1, count // 5)
    if count == 400:
        monkeypatch.setattr(text_corpus, "FEW_RECORDS", 100)
        assert documents(TextData(path=str(tmp_path / "a.jsonl"), text_field="body", seq_len=8,
                                  cache_dir=str(tmp_path / "d"))) == found  # fmt: skip


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of '.*a.jsonl' is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 of '.*a.jsonl' is a JSON list"),
    ("a.jsonl", b'{"body": "a", "id": 1}\n', "line 1 .* has no field 'text'; it has body, id: set data.text_field"),
    ("a.jsonl", b'{"text": 5}\n', "line 1 of '.*' *: field 'text' holds int"),
    ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2 .* is not JSON"),
    ("a.jsonl", b'{"text": "\xff"}\n', "is not UTF-8"),
    ("a.csv", b"id,body\n1,x\n", "the header of '.*a.csv' has no field 'text'; it has id, body"),
    ("a.csv", b'text\n"unclosed', "is not csv"),
    ("a.csv", b"", "the header of .* has no field"),
    ("a.jsonl.gz", b"no gzip", "cannot be read: .*gzip"),
    ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:40], "cannot be read"),
    ("a.txt.bz2", b"BZh9" + b"\0" * 50, "cannot be read"),
    ("a.txt.xz", b"\xfd7zXZ\0" + b"\0" * 50, "cannot be read"),
    ("a.tar.gz", gzip.compress(b"file\0\0\0text", mtime=0), "is not text: NUL at byte 4"),
    ("a.jsonl", b"\n\n", "tokens to train on, too few"),
])  # fmt: skip
def test_bad_files_are_explained(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        TextData(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache")).setup()


def test_missing_readers_name_their_package(tmp_path, monkeypatch):
    for module, name in (("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")):
        monkeypatch.setitem(sys.modules, module, None)
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"needs .*{module}: pip install {module}"):
            TextData(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache")).setup()


def test_a_field_that_would_do_nothing_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    with pytest.raises(ValueError, match="data.text_field = 'body' does nothing"):
        TextData(path=str(tmp_path / "a.txt"), text_field="body", cache_dir=str(tmp_path)).setup()
    with pytest.raises(ValueError, match="data.corpus.text_column"):
        TextData(corpus={"name": "x"}, text_field="body")


def test_large_record_files_are_read_in_pieces(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        for i in range(3000):
            file.write(json.dumps({"text": f"{i} " + "x" * 1000}) + "\n")
    rows = text_files.read_records(str(tmp_path / "a.jsonl.gz"), "text")
    assert sum(len(row) for row in rows) > 3e6


# ---------------------------------------------------------------- the end of a document


def tokenizer_file(folder, special=(), config=None):
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_str(train_bpe(["document is short"], 280).to_dict()["json"])
    made.add_special_tokens([AddedToken(s, special=True) for s in special])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder / "tokenizer.json")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(40):
        (tmp_path / "d" / f"{i}.txt").write_text(f"document {i} is short and it ends here. " * 20)
    return tmp_path / "d"


@pytest.mark.parametrize("name", END_TOKENS)
def test_documents_end_with_the_end_token_and_predict_it(folder, tmp_path, name):
    path = tokenizer_file(tmp_path / "t", ["<pad>", name])
    data = TextData(path=str(folder), tokenizer=path, seq_len=32, batch_size=2, cache_dir=str(tmp_path / "c"))
    end = JsonTokenizer.from_file(path).end_token
    for split in ("train", "val"):
        side = data._side(split)
        assert (side.tokens[side.starts[1:] - 1] == end).all() and (side.tokens == end).sum() == len(side.starts) - 1
        assert side.counts[end] == len(side.starts) - 1
    labels = np.concatenate([batch["labels"].flatten() for batch in data.val_dataloader()])
    assert (labels == end).sum() == data.describe()["val_documents"]
    assert data.tokenizer.to_dict()["end_token"] == end == from_dict(data.tokenizer.to_dict()).end_token


def test_which_end_token(folder, tmp_path):
    assert JsonTokenizer.from_file(tokenizer_file(tmp_path / "a")).end_token is None
    named = tokenizer_file(tmp_path / "b", ["</s>", "<stop>"], {"eos_token": {"content": "<stop>"}})
    assert JsonTokenizer.from_file(named).end_token == JsonTokenizer.from_file(named).encode("<stop>")[0]

    def data(**arguments):
        return TextData(path=str(folder), seq_len=8, cache_dir=str(tmp_path / "c"), **arguments)

    assert data(tokenizer=named, end_token="none").tokenizer.end_token is None
    assert (
        data(tokenizer=named, end_token="</s>").tokenizer.decode(
            [data(tokenizer=named, end_token="</s>").tokenizer.end_token]
        )
        == "</s>"
    )
    with pytest.raises(ValueError, match="data.end_token = '<x>' is no token"):
        data(tokenizer=named, end_token="<x>")
    with pytest.raises(ValueError, match="bytes have no such token"):
        data(end_token="</s>")
    assert data().tokenizer.end_token is None and data().describe()["end_token"] is None
    learnt = data(tokenizer="bpe", bpe_vocab_size=300, end_token="<end>")
    assert (learnt._side("train").tokens == learnt.tokenizer.end_token).sum() == learnt.describe()["train_documents"]
    assert data(tokenizer="bpe", bpe_vocab_size=300).tokenizer.end_token is None


def test_runs_from_before_end_tokens_go_on_with_the_same_tokens(folder, tmp_path):
    path = tokenizer_file(tmp_path / "t", ["</s>"])
    make = lambda **more: TextData(path=str(folder), tokenizer=path, seq_len=32, cache_dir=str(tmp_path / "c"), **more)  # noqa: E731
    before = make(end_token="none")
    state = {key: value for key, value in before.state_dict().items() if key != "end_token"}
    now = make()
    now.trainer = types.SimpleNamespace(state=types.SimpleNamespace(fn="fit"))
    now.load_state_dict(state)
    assert np.array_equal(now._side("train").tokens, before._side("train").tokens)
    with pytest.raises(ValueError, match="had data end_token"):
        other = make()
        other.trainer = now.trainer
        other.load_state_dict(before.state_dict())


def test_a_document_cut_in_two_ends_once(tmp_path):
    (tmp_path / "one.txt").write_text("line of text\n" * 500)
    path = tokenizer_file(tmp_path / "t", ["</s>"])
    data = TextData(path=str(tmp_path / "one.txt"), tokenizer=path, seq_len=8, cache_dir=str(tmp_path / "c"))
    end = data.tokenizer.end_token
    assert (data._side("train").tokens == end).sum() == 0 and (data._side("val").tokens == end).sum() == 1
