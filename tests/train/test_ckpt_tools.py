"""`ssmzoo ckpt show|diff|average|export` on small checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ssmzoo.checkpoint_files import read_weights
from ssmzoo.cli.main import main
from ssmzoo.presets import build_model
from ssmzoo.train.checkpoint import write_checkpoint
from ssmzoo.zoo import load_model

NODE = {"_target_": "ssmzoo.models.mamba.MambaLM", "d_model": 16, "n_layer": 1, "vocab_size": 32}


@pytest.fixture
def ckpt(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["ckpt", *map(str, arguments)])
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    return run


def make(path, seed, **changed):
    torch.manual_seed(seed)
    node = NODE | changed
    manifest = {
        "model": "mamba",
        "config": {"model": node, "seed": seed},
        "step": 10 * seed,
        "epoch": 0,
        "versions": {"torch": "2"},
        "git_commit": "abc",
        "data": {"files": 3},
        "metrics": {"val/loss": 1.25},
    }
    return write_checkpoint(path, build_model(node).state_dict(), manifest, {"optimizer": seed})


def test_show_says_what_a_checkpoint_is(ckpt, tmp_path):
    status, out, _ = ckpt("show", make(tmp_path / "a", 1), "--tensors")
    assert status == 0 and "step 10" in out and "val/loss 1.25" in out and "git commit  abc" in out
    assert out.count("... ok") == 2 and "embedding" in out and '{"files": 3}' in out
    (tmp_path / "a/trainer.ckpt").write_bytes(b"")
    assert ckpt("show", tmp_path / "a")[0] == 2 and ckpt("show", tmp_path / "none")[0] == 2


def test_diff_shows_configuration_and_weights(ckpt, tmp_path):
    a, b, wide = make(tmp_path / "a", 1), make(tmp_path / "b", 2), make(tmp_path / "c", 1, d_model=32)
    status, out, _ = ckpt("diff", a, b)
    assert status == 0 and "seed: 1 -> 2" in out and "changed by" in out
    assert ckpt("diff", a, a)[1] == ""
    out = ckpt("diff", a, wide)[1]
    assert "model.d_model: 16 -> 32" in out and "(32, 16) -> (32, 32)" in out


def test_average_is_the_mean_and_loads(ckpt, tmp_path):
    folders = [make(tmp_path / str(i), i) for i in (1, 2, 3)]
    status, out, _ = ckpt("average", *folders, "--out", tmp_path / "mean")
    assert status == 0 and "average of 3" in out
    weights = [read_weights(f) for f in folders]
    for name, value in read_weights(tmp_path / "mean").items():
        torch.testing.assert_close(value, torch.stack([w[name] for w in weights]).mean(0))
    model, manifest = load_model(tmp_path / "mean")
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape == (1, 4, 32) and len(manifest["averaged"]) == 3
    assert ckpt("average", *folders, "--out", tmp_path / "mean")[0] == 2  # nothing is written over
    status, _, err = ckpt("average", folders[0], make(tmp_path / "w", 1, d_model=32), "--out", tmp_path / "no")
    assert status == 2 and "different models" in err and not (tmp_path / "no").exists()


def test_export_gives_the_weights_alone(ckpt, tmp_path):
    folder = make(tmp_path / "a", 1)
    for file in ("w.safetensors", "w.pt"):
        assert ckpt("export", folder, "--out", tmp_path / file)[0] == 0
    first, second = load_file(tmp_path / "w.safetensors"), torch.load(tmp_path / "w.pt", weights_only=True)
    for name, value in build_model(NODE).state_dict().items():
        assert first[name].shape == value.shape and torch.equal(first[name], second[name])
    status, _, err = ckpt("export", folder, "--out", tmp_path / "w.onnx")
    assert status == 2 and ".safetensors or .pt" in err and not list(tmp_path.glob("*.onnx"))


def test_a_manifest_tells_where_a_checkpoint_came_from(tmp_path):
    manifest = json.loads((make(tmp_path / "a", 1) / "manifest.json").read_text())
    assert manifest["files"].keys() == {"model.safetensors", "trainer.ckpt"}
    assert all(len(digest) == 64 for digest in manifest["files"].values())
    with pytest.raises(FileExistsError):
        make(tmp_path / "a", 2)
