"""ssmzoo predict, score and embed on runs, and the functions behind them."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import ROOT
from PIL import Image

from ssmzoo.cli.main import main
from ssmzoo.inference.embed import before_head
from ssmzoo.inference.score import score
from ssmzoo.inference.subject import load_subject

RUNS = ROOT / "tests" / "train" / "old_runs"
CLASSIFIER, LANGUAGE = (str(RUNS / kind) for kind in ("classification", "language"))


@pytest.fixture
def digits(tmp_path) -> Path:
    from sklearn.datasets import load_digits

    folder = tmp_path / "digits"
    folder.mkdir()
    for i, image in enumerate(load_digits().images[:7]):
        Image.fromarray((image * 15.9).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def call(*words) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_pictures_get_classes_with_probabilities_as_table_and_sheet(digits, tmp_path, capsys):
    table, sheet = tmp_path / "found.csv", tmp_path / "sheet.png"
    assert call("predict", CLASSIFIER, digits, "--top", 3, "-o", table, "--sheet", sheet) == 0
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 21 and [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    assert sheet.stat().st_size > 5000 and capsys.readouterr().out.count(" %") == 21
    assert (
        call("predict", CLASSIFIER, digits / "0.png", digits / "1.png", "-o", tmp_path / "found.json", "--batch", 1)
        == 0
    )
    found = json.loads((tmp_path / "found.json").read_text())
    for one, several in zip(found, (rows[:3], rows[3:6])):
        assert one["classes"][:3] == [row["class"] for row in several]
        assert math.isclose(one["probabilities"][0], float(several[0]["probability"]), abs_tol=1e-5)


def test_probabilities_are_the_models_own(digits):
    from ssmzoo.inference.predict import predict, transform_of

    subject = load_subject(CLASSIFIER)
    p = next(predict(subject, [digits / "3.png"], top=10))
    assert math.isclose(sum(p.probabilities), 1, abs_tol=1e-5) and len(set(p.classes)) == 10
    image = transform_of(subject)(Image.open(digits / "3.png"))
    with torch.no_grad():
        expected = subject.model(image[None]).softmax(-1)[0]
    assert p.classes[0] == subject.class_name(int(expected.argmax()))
    assert torch.allclose(torch.tensor(p.probabilities), expected.sort(descending=True).values, atol=1e-5)


def test_a_damaged_picture_costs_one_message_and_not_the_others(digits, capsys, monkeypatch):
    import io

    (digits / "0.png").write_bytes(b"no picture")
    names = "\n".join(str(file) for file in sorted(digits.iterdir()))
    monkeypatch.setattr("sys.stdin", io.StringIO(names))
    assert call("predict", CLASSIFIER, "-") == 1
    shown = capsys.readouterr()
    assert shown.out.count(".png:") == 6 and len(shown.err.strip().splitlines()) == 1 and "0.png" in shown.err


def test_the_chain_rule_holds_whatever_the_pieces():
    subject = load_subject(LANGUAGE)
    text = "Der Mond ist aufgegangen; 100 €."
    whole = score(subject, text)
    ids = torch.tensor([subject.tokenizer.encode(text)])
    with torch.no_grad():
        logits = subject.model(ids).logits[0, :-1].double()
    expected = -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert math.isclose(whole.total, float(expected), rel_tol=1e-6)
    assert "".join(whole.pieces) == text and whole.log_likelihoods[0] is None
    assert len(whole.pieces) == len(whole.log_likelihoods) == ids.shape[1]
    for chunk in (1, 3, 7, 1000):
        got = score(subject, text, chunk).log_likelihoods[1:]
        assert np.allclose(got, whole.log_likelihoods[1:], atol=1e-4)
    assert math.isclose(whole.perplexity, math.exp(-whole.total / (ids.shape[1] - 1)))


def test_score_shows_tokens_colours_and_json(capsys):
    assert call("score", LANGUAGE, "abc") == 0
    assert "3 tokens, log-likelihood" in capsys.readouterr().out
    assert call("score", LANGUAGE, "abc", "--colour", "always") == 0
    assert "\x1b[48;5;" in capsys.readouterr().out
    assert call("score", LANGUAGE, "a\x1b[2Jbc", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 7


def test_features_are_what_the_head_reads(digits, tmp_path):
    assert call("embed", CLASSIFIER, digits, "-o", tmp_path / "f.npz") == 0
    stored = np.load(tmp_path / "f.npz")
    subject = load_subject(CLASSIFIER)
    assert stored["features"].shape == (7, subject.model.head_hidden_size) and len(stored["names"]) == 7


def test_features_as_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install pyarrow)")
    parquet = pytest.importorskip("pyarrow.parquet")
    assert call("embed", LANGUAGE, "one text", "another", "-o", tmp_path / "f.parquet") == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    model = load_subject(LANGUAGE)
    hidden = before_head(model.model, torch.tensor([model.tokenizer.encode("another")]))[0].detach()
    assert table.column("name").to_pylist() == ["one text", "another"]
    stored = [column[1].as_py() for column in table.columns[1:]]
    assert np.allclose(stored, hidden.mean(0).numpy(), atol=1e-6)


WRONG = {
    "no such run": (["predict", "runs/nothing", "a.png"], "no run, checkpoint or model"),
    "near name": (["predict", "vmamba_tny", "a.png"], "nearest: vmamba_tiny"),
    "not released": (["predict", "mamba_100m", "a.png"], "no released weights are known"),
    "no picture": (["predict", CLASSIFIER, "nothing.png"], "no picture or folder at nothing.png"),
    "no classifier": (["predict", LANGUAGE, str(ROOT / "docs")], "picture"),
    "no table": (["predict", CLASSIFIER, "a.png", "-o", "a.txt"], "must end in .csv or .json"),
    "no language": (["score", CLASSIFIER, "text"], "without a tokenizer"),
    "no text": (["score", LANGUAGE, ""], "the text is empty"),
    "no device": (["score", LANGUAGE, "a", "--device", "abacus"], "--device is abacus"),
    "no features": (["embed", LANGUAGE, "a", "-o", "a.csv"], "must end in .npz or .parquet"),
    "no pool": (["embed", LANGUAGE, "a", "-o", "a.npz", "--pool", "sum"], "choose one of mean, last"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_told_in_one_message(case, capsys):
    words, message = WRONG[case]
    assert call(*words) == 2
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and shown[0].startswith("error: ") and message in shown[0]


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A language model that a hub on the loopback offers as released weights "mamba", and the same as a folder."""
    from hub_server import Server

    from ssmzoo.data.text_tokenizer import train_bpe
    from ssmzoo.presets import build_preset
    from ssmzoo.released import catalogue as weights

    tokenizer = train_bpe(["the cat and the hat and the bat"] * 3, 262)
    torch.manual_seed(0)
    model = build_preset("mamba", vocab_size=tokenizer.vocab_size, d_model=16, n_layer=1)
    folder, server = tmp_path / "folder", Server()
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "tokenizer.json").write_text(tokenizer.to_dict()["json"])
    server.files["owner/repo/pytorch_model.bin"] = (folder / "pytorch_model.bin").read_bytes()
    server.files["owner/words/tokenizer.json"] = (folder / "tokenizer.json").read_bytes()
    for name, value in ("HF_ENDPOINT", server.url), ("HF_HOME", tmp_path / "hf"), ("TORCH_HOME", tmp_path / "torch"):
        monkeypatch.setenv(name, str(value))
    source = weights.Hub("owner/repo", "pytorch_model.bin")
    more = {"model": {"d_model": 16, "n_layer": 1, "vocab_size": tokenizer.vocab_size}, "tokenizer": "owner/words"}
    entry = weights.Weights("mamba", source, family="mamba", **more)
    for place in ("released.catalogue", "inference.subject", "inference.export.source"):
        monkeypatch.setattr(f"ssmzoo.{place}.catalogue", lambda: {"mamba": entry})
    yield folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "{}", "--prompt", "the cat", "--greedy", "--max-new-tokens", "5", "--device", "cpu"],
        ["score", "{}", "the cat and", "--json"],
        ["embed", "{}", "the cat", "-o", "f.npz"],
        ["ckpt", "export", "{}", "--to", "mamba_ssm", "--out", "out"],
    ],
    ids=["generate", "score", "embed", "export"],
)
def test_a_name_and_a_folder_of_released_weights_do_the_same(words, released, tmp_path, monkeypatch, capsys):
    seen = []
    for given in ("mamba", str(released)):
        (tmp_path / str(len(seen))).mkdir()
        monkeypatch.chdir(tmp_path / str(len(seen)))
        assert call(*(word.format(given) for word in words)) == 0
        shown = capsys.readouterr().out
        if Path("f.npz").exists():
            shown = str(np.load("f.npz")["features"])
        elif Path("out").exists():
            shown = str(torch.load("out/pytorch_model.bin"))
        seen.append(shown)
    assert seen[0] == seen[1] and len(seen[0]) > 5


def test_a_released_file_without_its_tokenizer_asks_for_it(released, capsys):
    (released / "tokenizer.json").unlink()
    assert call("generate", released, "--prompt", "a") == 2
    assert "put the tokenizer.json of a released model beside its file" in capsys.readouterr().err
