"""Files made to do harm, and files that were cut off: refused with a message, and nothing in them is run."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from toy import ToyData, make

from ssmzoo.checkpoint_files import find_checkpoint, read_weights, sha256
from ssmzoo.presets import build_model
from ssmzoo.released.files import CheckpointError, read_state_dict
from ssmzoo.train.checkpoint import FolderCheckpointIO, write_checkpoint
from ssmzoo.zoo import create_model, load_model


class Harm:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("foreign") / "run"
    trainer, task, _, _ = make(run, max_steps=2, val_check_interval=100)
    trainer.fit(task, datamodule=ToyData())
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def put(folder, name, content):
    """Replace a file of a checkpoint and make its SHA-256 fit, as whoever means harm would."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def load(run):
    return FolderCheckpointIO(dict).load_checkpoint(find_checkpoint(run, "last"))


@pytest.mark.parametrize("name", ["trainer.ckpt", "model.safetensors"])
def test_a_pickle_is_never_run(run, tmp_path, name):
    witness, folder = tmp_path / "witness", find_checkpoint(run, "last")
    torch.save({"state": Harm(witness)}, tmp_path / "harm.pt")
    for content in ((tmp_path / "harm.pt").read_bytes(), pickle.dumps({"state": Harm(witness)})):
        put(folder, name, content)
        with pytest.raises(CheckpointError, match="refused|cut off or damaged"):
            load(run)
    for suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        file = tmp_path / f"weights{suffix}"
        file.write_bytes((tmp_path / "harm.pt").read_bytes())
        with pytest.raises(CheckpointError, match="refused|cut off or damaged"):
            read_state_dict(file)
    assert not witness.exists()


def bomb(path, source):
    """A zip of the same entries, and 64 MB of zeros that weigh 64 KB."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry))
        new.writestr("archive/data/99", bytes(64 << 20))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(run, tmp_path):
    folder = find_checkpoint(run, "last")
    bomb(tmp_path / "bomb.pt", folder / "trainer.ckpt")
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 20
    put(folder, "trainer.ckpt", (tmp_path / "bomb.pt").read_bytes())
    with pytest.raises(CheckpointError, match="would unpack to 67,.* bytes .*refused"):
        load(run)
    with pytest.raises(CheckpointError, match="would unpack to"):
        read_state_dict(tmp_path / "bomb.pt")


@pytest.mark.parametrize("name", ["trainer.ckpt", "model.safetensors", "manifest.json"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused(run, name, share):
    file = find_checkpoint(run, "last") / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="SHA-256|cut off"):
        load(run)
    if name != "manifest.json":  # and when the digest was changed along with it
        put(file.parent, name, content[: int(len(content) * share)])
        with pytest.raises(CheckpointError, match="refused|cut off"):
            load(run)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", "sub/model.safetensors"])
def test_a_path_outside_the_checkpoint_is_refused(run, name):
    folder = find_checkpoint(run, "last")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = "0"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="outside the checkpoint folder"):
        load(run)
    index = json.loads((run / "checkpoints/index.json").read_text()) | {"last": name, "best": [], "recent": []}
    (run / "checkpoints/index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a folder beside it"):
        find_checkpoint(run, "last")


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "ssmzoo.train.run.subprocess",
        "builtins.eval",
        "ssmzoo.models.mamba.importlib",
        "ssmzoo.models.nothing.Mamba",
        "ssmzoo.models.mamba.nn.Linear",
        "ssmzoo.models.mamba.Tensor",
        "Mamba",
        7,
        None,
    ],
)
def test_a_foreign_target_is_never_called(tmp_path, target):
    weights = {"weight": torch.zeros(2)}
    write_checkpoint(tmp_path / "ckpt", weights, {"model": "mamba", "config": {"model": {"_target_": target}}})
    with pytest.raises(CheckpointError, match="cannot be built"):
        load_model(tmp_path / "ckpt")
    with pytest.raises((ValueError, TypeError)):
        build_model({"_target_": target})


def test_targets_of_data_and_task_must_be_defined_in_the_package(tmp_path):
    from ssmzoo.train.config import ConfigError, locate

    for target in (
        "ssmzoo.data.images.contextlib.suppress",
        "ssmzoo.data.text.Path",
        "ssmzoo.data.images.random",
        "lightning.pytorch.cli.instantiate_module",
        "ssmzoo.data.photos.np",
    ):
        with pytest.raises(ConfigError, match="refused|cannot be imported"):
            locate(target, "ssmzoo.data.")


def test_a_manifest_of_any_size_or_depth_is_refused_not_crashed_on(run, monkeypatch):
    manifest = find_checkpoint(run, "last") / "manifest.json"
    manifest.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(run)
    monkeypatch.setattr("ssmzoo.checkpoint_files.LARGEST_JSON", 1000)
    manifest.write_text(json.dumps({"a": "x" * 2000}))
    with pytest.raises(CheckpointError, match="more than 1,000: refused"):
        load(run)


def test_weights_of_another_model_are_refused_with_what_differs(run, tmp_path):
    model = create_model("mamba", d_model=16, n_layer=1, vocab_size=32)
    node = {"_target_": "ssmzoo.models.mamba.MambaLM", "d_model": 32, "n_layer": 1, "vocab_size": 32}
    write_checkpoint(tmp_path / "ckpt", model.state_dict(), {"model": "mamba", "config": {"model": node}})
    with pytest.raises(CheckpointError, match="wrong shapes"):
        load_model(tmp_path / "ckpt")
    assert read_weights(tmp_path / "ckpt").keys() == model.state_dict().keys()
