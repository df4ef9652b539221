"""`ssmzoo quantise`: a run becomes a checkpoint of integers that everything reads like any other."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from ssmzoo.adapt.quantise import Settings
from ssmzoo.checkpoint_files import CheckpointError, read_manifest
from ssmzoo.cli.main import main
from ssmzoo.cli.quantise import mixture
from ssmzoo.data.text import TextData
from ssmzoo.inference.generate import generate
from ssmzoo.inference.subject import load_subject
from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.train.checkpoint import write_checkpoint
from ssmzoo.train.init_from import start_from
from ssmzoo.train.quantise import quantise_checkpoint, windows
from ssmzoo.zoo import load_model

MODEL = {"vocab_size": 256, "d_model": 48, "n_layer": 2, "ssm_cfg": {"d_state": 8, "headdim": 8}}


@pytest.fixture
def run(tmp_path):
    """A checkpoint of an untrained model on a small text."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i}: the quick brown fox number {i * i}" for i in range(400)))
    data = {"path": str(text), "seq_len": 64, "batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    torch.manual_seed(0)
    manifest = {
        "model": "mamba2",
        "config": {
            "model": {"_target_": "ssmzoo.models.mamba2.Mamba2LM", **MODEL},
            "data": {"_target_": "ssmzoo.data.text.TextData", **data},
        },
        "tokenizer": TextData(**data).tokenizer.to_dict(),
        "metrics": {"val/loss": 5.5},
    }
    return write_checkpoint(tmp_path / "run", Mamba2LM(**MODEL).state_dict(), manifest)


def test_a_run_becomes_a_checkpoint_that_loads_like_any_other(run, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["quantise", str(run), "--mode", "w4a16", "--samples", "8"])
    out = run.with_name("run-w4a16")
    assert "bytes of weights" in capsys.readouterr().out
    manifest = read_manifest(out)
    assert manifest["quantisation"]["settings"]["mode"] == "w4a16" and "metrics" not in manifest
    assert manifest["quantisation"]["calibration"] | {"fingerprint": ""} == {
        "of": "training part",
        "fingerprint": "",
        "samples": 8,
        "values": 512,
    }
    assert (out / "model.safetensors").stat().st_size < 0.3 * (run / "model.safetensors").stat().st_size
    model, _ = load_model(out)
    assert model.backbone.embedding.weight.data_ptr() == model.lm_head.weight.data_ptr()
    subject = load_subject(str(out))
    assert len(generate(subject.model, [subject.tokenizer.encode("line ")], 4, greedy=True)[0]) == 4


def test_the_same_command_writes_the_same_bytes(run, tmp_path):
    made = [quantise_checkpoint(run, tmp_path / name, Settings(mode="w8a8"), samples=8).folder for name in "ab"]
    for file in ("model.safetensors", "manifest.json"):
        assert (made[0] / file).read_bytes() == (made[1] / file).read_bytes()


def test_transformers_reads_it(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    import ssmzoo.hf  # noqa: F401
    from ssmzoo.inference.export import export

    out = quantise_checkpoint(run, tmp_path / "q", Settings(mode="w4a8"), samples=8).folder
    ids = torch.arange(40)[None]
    expected = load_model(out)[0](ids).logits
    exported = export(out, "hf", tmp_path / "hf")
    for path in (out, exported):
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match="integers of our own form"):
        export(out, "safetensors", tmp_path / "other")


def test_the_text_that_is_given_is_calibrated_on(run, tmp_path):
    (tmp_path / "other.txt").write_text("some other text " * 100)
    made = quantise_checkpoint(run, tmp_path / "q", Settings(mode="w8a8"), 4, 200, text=str(tmp_path / "other.txt"))
    noted = read_manifest(made.folder)["quantisation"]["calibration"]
    assert noted == {"of": "other.txt", "samples": 4, "values": 800}


def test_what_cannot_be_is_refused_in_words(run, tmp_path):
    made = quantise_checkpoint(run, tmp_path / "q", Settings(mode="w8a16"), samples=8).folder
    with pytest.raises(ValueError, match="is quantised already \\(w8a16\\); start from .*run"):
        quantise_checkpoint(made)
    with pytest.raises(FileExistsError, match="choose another --out"):
        quantise_checkpoint(run, made)
    with pytest.raises(ValueError, match="too few for GPTQ"):
        quantise_checkpoint(run, tmp_path / "r", samples=2)
    with pytest.raises(CheckpointError, match="integers cannot be trained"):
        start_from(Mamba2LM(**MODEL), str(made))
    with pytest.raises(ValueError, match="GLOB=MODE"):
        mixture(["w8a8"])
    damaged = tmp_path / "damaged"
    shutil.copytree(made, damaged)
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["quantisation"]["modules"][1][2]["in_features"] = 10**9
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="the model has 48"):
        load_model(damaged)


def test_windows_are_spread_over_the_text():
    found = windows(np.arange(1000), 3, 100)
    assert [w[0].item() for w in found] == [0, 450, 900] and all(len(w) == 100 for w in found)
    assert len(windows(np.arange(250), 8, 100)) == 2 and windows(np.arange(0), 8, 100) == []
