"""Text data: what is held out, what a window holds, that order and resuming are exact, and what bad input says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ssmzoo.data import text_corpus, text_files, text_store
from ssmzoo.data.loader import Draw
from ssmzoo.data.shuffle import Permutation
from ssmzoo.data.text import TextData
from ssmzoo.data.text_corpus import FileCorpus
from ssmzoo.data.text_files import read_pieces
from ssmzoo.data.text_hub import HuggingFaceCorpus
from ssmzoo.data.text_tokenizer import ByteTokenizer, JsonTokenizer, from_dict, train_bpe
from ssmzoo.data.text_windows import Windows
from ssmzoo.tasks.metrics.ngram import unigram_bits_per_byte, unigram_bits_per_token


@pytest.fixture
def folder(tmp_path):
    """Forty files of 50 to 240 bytes whose text names the file, two of them the same, one empty, one hidden."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    for i in range(40):
        (root / ("sub" if i % 3 else ".") / f"{i:02}.txt").write_text(f"file {i}: grüße €{i} " * (3 + i % 9) + "\n")
    (root / "zz_same.txt").write_text((root / "00.txt").read_text())
    (root / "empty.txt").write_text("")
    (root / ".hidden").write_bytes(b"\0")
    return root


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def data(folder, cache):
    return TextData(path=str(folder), seq_len=16, batch_size=4, val_fraction=0.2, cache_dir=cache)


def split_of(tokens, starts=None):
    tokens = np.asarray(tokens, dtype=np.uint8)
    starts = np.array([0, len(tokens)] if starts is None else starts)
    return text_store.Split(tokens, starts, np.bincount(tokens, minlength=256), len(tokens))


def pairs(windows, draws):
    """Every (input token, label) that is trained."""
    items = [windows[draw] for draw in draws]
    return [(int(a), int(b)) for item in items for a, b in zip(item["input_ids"], item["labels"]) if b >= 0]


# ---------------------------------------------------------------- corpora


def test_default_corpus_is_the_standard_library_without_tests(cache):
    data = TextData(cache_dir=cache)
    about = data.describe()
    total = about["train_bytes"] + about["val_bytes"]
    assert 5e6 < total < 40e6 and len(about["fingerprint"]) == 64 and about["vocab_size"] == 256
    assert 0.01 < about["val_bytes"] / total < 0.15
    names = [source.name for source in data.corpus._sources]
    assert "json/decoder.py" in names and names == sorted(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    assert 4 < unigram_bits_per_byte(data) < 5.5


def test_documents_are_split_by_content_and_nothing_leaks(data, folder):
    data.setup()
    documents = {
        split: [bytes(side.tokens[a:b]) for a, b in zip(side.starts, side.starts[1:])]
        for split, side in [("train", data._side("train")), ("val", data._side("val"))]
    }
    texts = {path.read_bytes() for path in folder.rglob("*.txt")} - {b""}
    assert not set(documents["train"]) & set(documents["val"])
    assert set(documents["train"]) | set(documents["val"]) == texts
    assert len(documents["train"]) + len(documents["val"]) == 40  # identical files count once
    assert data.describe()["val_documents"] == len(documents["val"]) >= 2


def test_held_out_files_stay_held_out_when_the_corpus_grows(folder, tmp_path):
    def held_out():
        corpus = FileCorpus(str(folder))
        corpus.identity(tmp_path, 0.2)
        return {source.name for source in corpus._sources if source.split == "val"}

    before = held_out()
    (folder / "new.txt").write_text("something new\n" * 5)
    assert before and held_out() - {"new.txt"} == before


def test_single_file_is_split_at_a_line_near_its_end(tmp_path, cache):
    lines = [f"line {i} of the file\n" for i in range(200)]
    (tmp_path / "one.txt").write_text("".join(lines))
    data = TextData(path=str(tmp_path / "one.txt"), seq_len=8, val_fraction=0.1, cache_dir=cache)
    train, val = (data.decode(data._side(split).tokens) for split in ("train", "val"))
    assert train + val == "".join(lines) and train.endswith("\n")
    assert 0.08 < len(val) / len(train + val) <= 0.1


def test_glob_and_folder_and_names_do_not_depend_on_where_they_stand(folder, tmp_path):
    prints = [FileCorpus(str(p)).identity(tmp_path, 0.2) for p in (folder, folder / ".", folder / "**/*.txt")]
    assert prints[0] == prints[1] == prints[2]
    (folder / "00.txt").write_text("changed\n")
    assert FileCorpus(str(folder)).identity(tmp_path, 0.2) != prints[0]


def test_pieces_of_a_large_file_end_at_lines_and_keep_every_character(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 101)
    text = "".join(f"zeile {i} mit grüßen und €\n" for i in range(100)) + "x" * 300 + "ü"
    (tmp_path / "t").write_text(text)
    pieces = list(read_pieces(str(tmp_path / "t"), 0, len(text.encode())))
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(piece.endswith("\n") for piece in pieces[:20])


def test_scans_of_large_corpora_are_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_corpus, "REMEMBER_SCANS_ABOVE", 100)
    first = FileCorpus(str(folder)).identity(tmp_path, 0.2)
    monkeypatch.setattr(text_corpus, "scan", lambda path: pytest.fail("read again"))
    assert FileCorpus(str(folder)).identity(tmp_path, 0.2) == first


def test_hugging_face_dataset_streamed_or_not(tmp_path, cache, monkeypatch):
    pytest.importorskip("datasets", reason="Hugging Face datasets is not installed (pip install '.[hf]')")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"text": f"row {i}: " + "abc " * (i % 5 + 3), "n": i} for i in range(60)] + [{"text": None, "n": 0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    about = []
    for streaming in (False, True):
        corpus = {"name": "json", "data_files": str(tmp_path / "rows.jsonl"), "streaming": streaming}
        data = TextData(corpus=corpus, seq_len=8, val_fraction=0.2, cache_dir=f"{cache}{streaming}")
        about.append(data.describe())
    assert about[0] == about[1] and about[0]["train_documents"] + about[0]["val_documents"] == 60
    assert about[0]["val_documents"] >= 3
    few = TextData(corpus={**corpus, "max_documents": 25}, seq_len=8, val_fraction=0.2, cache_dir=cache)
    assert few.describe()["train_documents"] + few.describe()["val_documents"] == 25
    with pytest.raises(ValueError, match="text_column = 'body' is no column of 'json'; it has text, n"):
        TextData(corpus={**corpus, "text_column": "body"}, cache_dir=cache).setup()
    with pytest.raises(ValueError, match="holds int, not text"):
        TextData(corpus={**corpus, "text_column": "n"}, cache_dir=cache).setup()


def test_missing_datasets_package_names_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        TextData(corpus={"name": "anything"}, cache_dir=cache).setup()


# ---------------------------------------------------------------- tokenizers


def test_tokenizers_round_trip_and_describe_themselves(folder):
    text = "grüße, 世界 🙂\n\tdef f(): pass"
    bpe = train_bpe([p.read_text() for p in folder.rglob("*.txt")], 300)
    assert 256 < bpe.vocab_size <= 300
    for tokenizer in (ByteTokenizer(), bpe):
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert again.encode(text) == tokenizer.encode(text) and again.vocab_size == tokenizer.vocab_size
        assert tokenizer.decode(tokenizer.encode(text)) == text
        decoder = tokenizer.decoder()
        shown = [decoder.push([token]) for token in tokenizer.encode(text)]
        assert "".join(shown) + decoder.flush() == text and "\ufffd" not in "".join(shown)
    with pytest.raises(ValueError, match="tokenizer type 'words' is unknown"):
        from_dict({"type": "words"})


def test_unfinished_characters_are_held_back_and_broken_ones_given_up(folder):
    euro = list("€".encode())
    decoder = ByteTokenizer().decoder()
    assert [decoder.push([b]) for b in euro] == ["", "", "€"]
    assert decoder.push(euro[:1]) == "" and decoder.flush() == "\ufffd"
    bpe = train_bpe([""], 257)
    decoder = bpe.decoder()
    broken = bpe.encode("€")[:1] * 40
    assert "\ufffd" in "".join(decoder.push([token]) for token in broken)


def test_bpe_is_learnt_on_the_corpus_and_a_file_gives_the_same(data, folder, cache, tmp_path):
    options = dict(path=str(folder), seq_len=8, val_fraction=0.2, cache_dir=cache)
    learnt = TextData(tokenizer="bpe", bpe_vocab_size=280, **options)
    assert 256 < learnt.sizes["vocab_size"] <= 280
    assert learnt.bytes_per_token() > 1.2 and data.bytes_per_token() == 1
    (tmp_path / "t.json").write_text(learnt.tokenizer.to_dict()["json"])
    for tokenizer in (str(tmp_path / "t.json"), learnt.tokenizer.to_dict()):
        given = TextData(tokenizer=tokenizer, **options)
        assert np.array_equal(given._side("train").tokens, learnt._side("train").tokens)
    train = learnt._side("train")
    assert learnt.decode(train.tokens).encode() == bytes(data._side("train").tokens)
    assert [train.n_bytes, len(train.starts)] == [data._side("train").n_bytes, len(data._side("train").starts)]
    assert np.array_equal(train.counts, np.bincount(train.tokens, minlength=learnt.sizes["vocab_size"]))


# ---------------------------------------------------------------- the store


def test_store_is_found_again_and_mended_when_damaged(folder, cache, data, monkeypatch):
    first = np.array(data._side("train").tokens)
    stores = [p for p in data.cache_dir.glob("text/*")]
    assert len(stores) == 1 and not list(data.cache_dir.glob("text/.*"))  # nothing temporary is left
    real = text_store.build_store
    monkeypatch.setattr("ssmzoo.data.text.build_store", lambda *a: pytest.fail("tokenised again"))
    arguments = dict(path=str(folder), seq_len=16, val_fraction=0.2, cache_dir=cache)
    assert np.array_equal(TextData(**arguments)._side("train").tokens, first)
    monkeypatch.setattr("ssmzoo.data.text.build_store", real)
    with open(stores[0] / "train.tokens", "r+b") as file:
        file.truncate(10)
    assert np.array_equal(TextData(**arguments)._side("train").tokens, first)


def test_store_is_not_left_half_written(folder, cache, data, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "encode_batch", lambda self, texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.setup()
    assert not list((data.cache_dir / "text").iterdir())


def test_cache_follows_the_environment(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SSMZOO_CACHE", str(tmp_path / "elsewhere"))
    TextData(path=str(folder), seq_len=8, val_fraction=0.2).setup()
    assert list((tmp_path / "elsewhere" / "text").iterdir())


@pytest.mark.slow
def test_large_corpora_need_no_memory(tmp_path):
    """300 MB of text are tokenised and read with less than 100 MB more than imports take."""
    (tmp_path / "big.txt").write_bytes(b"the quick brown fox jumps over the lazy dog, again and again\n" * 5_000_000)
    code = f"""
import resource, sys
from ssmzoo.data.text import TextData
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = TextData(path={str(tmp_path / "big.txt")!r}, seq_len=1024, cache_dir={str(tmp_path / "cache")!r})
for i, batch in enumerate(data.train_dataloader()):
    if i == 20: break
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


# ---------------------------------------------------------------- windows and order


def test_windows_show_the_drawn_example():
    windows = Windows(split_of(list(b"abcdefg"), [0, 3, 7]), 6)
    item = windows[Draw(0, 0)]
    assert bytes(item["input_ids"].tolist()) == b"abcdef"
    assert item["labels"].tolist() == [*b"bc", -100, *b"efg"] and item["seq_idx"].tolist() == [0, 0, 0, 1, 1, 1]
    rest = windows[Draw(1, 0)]
    assert chr(rest["input_ids"][0]) == "g" and rest["labels"].tolist() == [-100] * 6 and len(windows) == 2


@pytest.mark.parametrize("n, seq_len, multiple_of", [(100, 7, 1), (100, 10, 3), (33, 32, 2), (64, 64, 1), (17, 50, 1)])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_predicts_every_token_once(n, seq_len, multiple_of, epoch):
    starts = [0, n // 3, n // 3 + 1, n - 2, n]
    tokens = np.arange(n)
    windows = Windows(split_of(tokens, starts), seq_len, seed=3, multiple_of=multiple_of)
    assert len(windows) % multiple_of == 0
    found = pairs(windows, [Draw(i, 0, epoch) for i in range(len(windows))])
    assert sorted(found) == [(t - 1, t) for t in range(n) if t not in starts]


def test_epochs_begin_at_different_offsets():
    windows = Windows(split_of(np.arange(200)), 10, seed=0)
    assert len({int(windows[Draw(0, 0, epoch)]["input_ids"][0]) for epoch in range(8)}) > 4


def test_labels_never_cross_a_document_and_seq_idx_marks_it(data):
    for batch in data.train_dataloader():
        crossing = batch["seq_idx"][:, 1:] != batch["seq_idx"][:, :-1]
        assert (batch["labels"][:, :-1][crossing] == -100).all()
        inside = ~crossing & (batch["labels"][:, :-1] != -100)
        assert (batch["labels"][:, :-1][inside] == batch["input_ids"][:, 1:][inside]).all()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 100, 1000])
def test_permutation_is_one(n):
    orders = [list(Permutation(n, seed)[i] for i in range(n)) for seed in range(6)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 3 or len(set(map(tuple, orders))) > 2


def test_permutation_spreads():
    """Neighbours are as far apart as in a random order: n / 3 on average."""
    order = np.array([Permutation(10_000, 1)[i] for i in range(10_000)])
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.01
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05


def test_a_shuffled_loader_goes_on_where_a_loop_left_it(data):
    whole, loader = batches(data.train_dataloader()), data.train_dataloader()
    assert same([next(iter(loader))["input_ids"], *batches(loader)], whole)
    val = data.val_dataloader()
    assert torch.equal(next(iter(val))["input_ids"], next(iter(val))["input_ids"])


def batches(loader):
    return [batch["input_ids"] for batch in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def test_order_depends_on_seed_and_epoch_only(data, folder, cache):
    loader = data.train_dataloader()
    first, second = batches(loader), batches(loader)
    assert not same(first, second)
    torch.manual_seed(123)
    again = data.train_dataloader()
    assert same(batches(again), first) and same(batches(again), second)
    other = TextData(path=str(folder), seq_len=16, batch_size=4, val_fraction=0.2, cache_dir=cache, seed=1)
    assert not same(batches(other.train_dataloader()), first)
    assert same(batches(data.val_dataloader()), batches(data.val_dataloader()))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [1, 7])
def test_resume_in_mid_epoch_is_exact(data, num_workers, taken):
    whole = data.train_dataloader()
    expected = batches(whole) + batches(whole)
    data.num_workers = num_workers
    loader = data.train_dataloader()
    iterator = iter(loader)
    seen = [next(iterator)["input_ids"] for _ in range(taken)]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert same(seen + batches(resumed) + batches(resumed), expected)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_without_repetition_or_loss(data, world):
    def trained(rank, world):
        data.trainer = type("Trainer", (), {"global_rank": rank, "world_size": world})()
        loader = data.train_dataloader()
        found = [
            (int(a), int(b))
            for batch in loader
            for a, b in zip(batch["input_ids"].flatten(), batch["labels"].flatten())
            if b >= 0
        ]
        return len(loader), found

    lengths, found = zip(*[trained(rank, world) for rank in range(world)])
    assert len(set(lengths)) == 1
    assert sorted(sum(found, [])) == sorted(trained(0, 1)[1])


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_anywhere_with_the_same_batches(data, tmp_path):
    import lightning as L

    class Recorder(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

        def training_step(self, batch, _):
            self.seen.append(batch["input_ids"].clone())
            return self.weight * 1.0

        def validation_step(self, batch, _):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(steps, ckpt=None):
        module = Recorder()
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            val_check_interval=3,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
        )
        arguments = dict(path=data.corpus.path, seq_len=16, batch_size=40, val_fraction=0.2, cache_dir=data.cache_dir)
        trainer.fit(module, datamodule=TextData(**arguments), ckpt_path=ckpt, weights_only=True)
        return trainer, module.seen

    data.batch_size = 40
    per_epoch = len(data.train_dataloader())
    _, expected = fit(2 * per_epoch + 3)
    for cut in (1, 6, per_epoch, per_epoch + 4, 2 * per_epoch):
        trainer, begun = fit(cut)
        trainer.save_checkpoint(tmp_path / f"{cut}.ckpt")
        _, rest = fit(2 * per_epoch + 3, tmp_path / f"{cut}.ckpt")
        assert same(begun + rest, expected), f"after {cut} of {per_epoch} steps"


def test_a_run_is_not_continued_on_other_data(data):
    state = data.state_dict()
    data.trainer = type("Trainer", (), {"state": type("State", (), {"fn": "fit"})()})()
    data.load_state_dict(state)
    with pytest.raises(ValueError, match="had data seq_len = 32, now it is 16"):
        data.load_state_dict(state | {"seq_len": 32})


def test_validation_is_capped_and_longer_windows_see_the_same_tokens(folder, cache):
    data = TextData(path=str(folder), seq_len=16, val_fraction=0.3, val_tokens=320, cache_dir=cache)
    tokens = torch.cat([batch["input_ids"].flatten() for batch in data.val_dataloader()])
    longer = torch.cat([b["input_ids"].flatten() for b in data.with_seq_len(64, batch_size=2).val_dataloader()])
    assert len(tokens) == 320 and torch.equal(tokens, longer)
    assert data.token_counts("val").sum() == 320 and data.seq_len == 16


# ---------------------------------------------------------------- the order-0 model


def test_unigram_cross_entropy_has_known_values():
    uniform = np.full(256, 1000)
    assert abs(unigram_bits_per_token(uniform, uniform) - 8) < 1e-9
    smoothed = -(np.log2(3 / 4) + np.log2(1 / 4)) / 2
    assert abs(unigram_bits_per_token(np.array([2, 0]), np.array([1, 1])) - smoothed) < 1e-9
    with pytest.raises(ValueError, match="shapes"):
        unigram_bits_per_token(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="nothing to predict"):
        unigram_bits_per_token(np.ones(3), np.zeros(3))


def test_unigram_bits_are_per_byte(data, folder, cache):
    bpe = TextData(path=str(folder), tokenizer="bpe", bpe_vocab_size=280, seq_len=8, val_fraction=0.2, cache_dir=cache)
    bits = unigram_bits_per_token(bpe.token_counts("train"), bpe.token_counts("val"))
    assert abs(unigram_bits_per_byte(bpe) - bits / bpe.bytes_per_token("val")) < 1e-9
    assert unigram_bits_per_byte(bpe) < unigram_bits_per_byte(data) < 8


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seq_len": 0}, r"data.seq_len = 0; it must be at least 1"),
        ({"batch_size": -4}, r"data.batch_size = -4"),
        ({"val_tokens": -1}, r"data.val_tokens = -1"),
        ({"num_workers": -1}, r"data.num_workers = -1"),
        ({"val_fraction": 1.5}, r"data.val_fraction = 1.5; give a share between 0 and 1"),
        ({"tokenizer": "gpt2"}, r"'gpt2' is neither 'bytes' nor 'bpe' nor an existing tokenizer.json"),
        ({"bpe_vocab_size": 500}, r"data.bpe_vocab_size = 500 does nothing for data.tokenizer = 'bytes'"),
        ({"path": "x", "corpus": {"name": "y"}}, "both given"),
        ({"corpus": {"nam": "y"}}, "data.corpus.nam is unknown; nearest: name; data.corpus takes name, subset"),
        ({"corpus": {"split": "train"}}, "data.corpus.name is missing"),
        ({"corpus": {"name": "y", "max_documents": 0}}, "max_documents = 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, cache):
    with pytest.raises(ValueError, match=message):
        TextData(cache_dir=cache, **arguments)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist .* give a text file, a folder, or a quoted glob"),
        (b"", "holds 1 file.s. but no text"),
        (b"text\0more", "'.*corpus.txt' is not text: NUL at byte 4"),
        (b"abc \xff\xfe", "'.*corpus.txt' is not UTF-8 text: invalid start byte near byte 4"),
        (b"cut \xe2\x82", "'.*corpus.txt' is not UTF-8 text"),
        (
            b"only a few words",
            "has 15 tokens to train on, too few .* data.seq_len = 64 .* choose data.seq_len below 15",
        ),
    ],
)
def test_bad_corpora_are_explained(content, message, tmp_path, cache):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TextData(path=str(path), seq_len=64, cache_dir=cache).setup()


def test_bad_folders_tokenizers_and_caches_are_explained(tmp_path, cache, folder):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="is a folder without files"):
        TextData(path=str(tmp_path / "nothing"), cache_dir=cache).setup()
    with pytest.raises(ValueError, match="matches no file"):
        TextData(path=str(tmp_path / "*.md"), cache_dir=cache).setup()
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(ValueError, match="picture.png' is not text.*give only text"):
        TextData(path=str(folder), cache_dir=cache).setup()
    for content in (b"{", b"{}", b"\xff\xfe"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.json' is not a"):
            TextData(tokenizer=str(tmp_path / "tokenizer.json"), cache_dir=cache)
    with pytest.raises(ValueError, match="bpe_vocab_size = 100; .* at least 257"):
        TextData(path=str(folder / "00.txt"), tokenizer="bpe", bpe_vocab_size=100, cache_dir=cache).setup()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="set SSMZOO_CACHE"):
        TextData(path=str(folder / "00.txt"), cache_dir=str(tmp_path / "file")).setup()


def test_corpus_classes_are_usable_alone(folder, cache):
    data = TextData(corpus=FileCorpus(str(folder)), seq_len=8, val_fraction=0.2, cache_dir=cache)
    assert data.describe()["corpus"] == str(folder)
    assert HuggingFaceCorpus("a").identity(folder, 0.1) != HuggingFaceCorpus("a", split="b").identity(folder, 0.1)
    assert JsonTokenizer(train_bpe(["a b a b"], 260).to_dict()["json"]).vocab_size >= 257


# ---------------------------------------------------------------- together with models


@pytest.mark.parametrize("name", ["mamba", "transformer", "moe_mamba"])
def test_no_gradient_reaches_another_document(data, name):
    from ssmzoo.models.baselines import TransformerLM
    from ssmzoo.models.mamba import MambaLM
    from ssmzoo.models.moe_mamba import MoEMambaLM

    model = {
        "mamba": lambda: MambaLM(256, 16, 2),
        "transformer": lambda: TransformerLM(256, 16, 2, 2),
        "moe_mamba": lambda: MoEMambaLM(256, 16, 2, n_experts=2, capacity_factor=8.0),
    }[name]()
    windows = Windows(data._side("train"), 128)
    item = next(w for w in (windows[Draw(i, 0)] for i in range(len(windows))) if 8 <= (w["seq_idx"] == 0).sum() <= 120)
    seen = []
    embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
    embedding.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out)) and None)
    logits = model(item["input_ids"][None], seq_idx=item["seq_idx"][None]).logits[0]
    second = item["seq_idx"] > 0
    torch.nn.functional.cross_entropy(logits[second], item["labels"][second]).backward()
    gradient = seen[0].grad[0].abs().sum(-1)
    assert (gradient[~second] == 0).all() and (gradient[second] > 0).sum() > 4
