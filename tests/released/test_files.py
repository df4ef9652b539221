"""Files of weights as scripts write them: read whole, without running anything, or refused in words."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from ssmzoo.checkpoint_files import FORMAT, read_manifest
from ssmzoo.released.files import CheckpointError, read_state_dict, read_weight_file
from ssmzoo.released.unpickle import STORAGES, Record

STATE = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.randn(3)}


class CfgNode(dict):
    """Stands for yacs's while a file is written; `gone` takes its module away again."""


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


@pytest.fixture
def yacs(monkeypatch):
    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)


def same(got, expected=STATE):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in expected.items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_training_scripts_save_beside_the_weights_becomes_a_record(tmp_path, yacs, monkeypatch, protocol):
    extra = {
        "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.95)),
        "config": CfgNode(MODEL=CfgNode(TYPE="vssm")),
        "seen": {1, 2},
        "best": __import__("numpy").float64(81.9),
        "where": __import__("pathlib").PurePosixPath("out"),
    }
    torch.save({"model": STATE, "epoch": 264, **extra}, tmp_path / "f.pth", pickle_protocol=protocol)
    monkeypatch.delitem(sys.modules, "yacs.config")
    found = read_weight_file(tmp_path / "f.pth")
    same(found.state)
    assert found.wrapper == "model" and found.beside["epoch"] == 264 and found.beside["seen"] == {1, 2}
    args, config = found.beside["args"], found.beside["config"]
    assert isinstance(args, Record) and args.name == "argparse.Namespace" and args.state["lr"] == 1e-3
    assert isinstance(config, Record) and config.name == "yacs.config.CfgNode" and config["MODEL"]["TYPE"] == "vssm"
    assert "yacs.config" not in sys.modules


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HARM = [
    (os.system, "touch {witness}"),
    (os.mkdir, "{witness}"),
    (subprocess.Popen, ["touch", "{witness}"]),
    (eval, "__import__('os').mkdir('{witness}')"),
    (exec, "__import__('os').mkdir('{witness}')"),
    (getattr, os, "mkdir"),
    (__import__, "os"),
    (open, "{witness}", "w"),
    (__import__("importlib").import_module, "os"),
    (__import__("runpy").run_path, "{witness}"),
    (__import__("shutil").rmtree, "{witness}"),
    (pickle.loads, b"cos\nmkdir\n(S'{witness}'\ntR."),
    (__import__("timeit").timeit, "1"),
    (__import__("webbrowser").open, "http://localhost"),
    (__import__("operator").attrgetter, "system"),
    (__import__("socket").socket,),
]


@pytest.mark.parametrize("harm", HARM, ids=[f"{h[0].__module__}.{h[0].__name__}" for h in HARM])
@pytest.mark.parametrize("inside", ["beside", "state"])
def test_a_file_that_names_what_runs_is_refused_by_that_name(tmp_path, harm, inside):
    witness = tmp_path / "witness"
    function, *arguments = harm
    arguments = [a.format(witness=witness) if isinstance(a, str) else a for a in arguments]
    if function is getattr:
        arguments = [Call(getattr, 1, "real"), "real"]
    call = Call(function, *arguments)
    torch.save({"model": STATE, "x": call} if inside == "beside" else STATE | {"x": call}, tmp_path / "f.pth")
    with pytest.raises(CheckpointError, match=rf"f.pth was refused: it names \w+.*{function.__name__}"):
        read_state_dict(tmp_path / "f.pth")
    assert not witness.exists()


def test_functions_of_other_packages_are_never_called(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(torch.hub, "load", lambda *a: called.append(a))
    torch.hub.load.__module__, torch.hub.load.__qualname__ = "torch.hub", "load"
    torch.save({"model": STATE, "x": Call(torch.hub.load, "somebody/repo", "net")}, tmp_path / "f.pth")
    assert read_weight_file(tmp_path / "f.pth").beside["x"].args == ("somebody/repo", "net")
    assert not called


def test_every_type_of_number_and_shared_and_strided_tensors(tmp_path):
    base = torch.arange(24).view(2, 3, 4)
    state = {str(dtype): base.to(dtype) for dtype in {*STORAGES.values()}} | {
        "transposed": base.float().mT,
        "part": base.float()[1, :, ::2],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    for new in (True, False):
        torch.save(OrderedDict(state), tmp_path / "f.pt", _use_new_zipfile_serialization=new)
        same(read_state_dict(tmp_path / "f.pt"), {k: v.detach() for k, v in state.items()})


def test_a_tensor_beyond_its_values_is_refused(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(64)}, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as old, zipfile.ZipFile(tmp_path / "g.pt", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content[:8] if entry.filename.endswith("/data/0") else content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state_dict(tmp_path / "g.pt")


def test_wrappers_and_their_order(tmp_path):
    other = {k: v + 1 for k, v in STATE.items()}
    torch.save({"model": {f"module.{k}": v for k, v in STATE.items()}, "model_ema": other}, tmp_path / "f.pth")
    same(read_state_dict(tmp_path / "f.pth"))
    same(read_state_dict(tmp_path / "f.pth", ("model_ema", "model")), other)
    torch.save({"state_dict": {"model": STATE}}, tmp_path / "f.pth")
    assert read_weight_file(tmp_path / "f.pth").wrapper == "state_dict.model"


def test_what_is_no_state_dict_is_named(tmp_path):
    for content, words in (
        (torch.nn.Linear(2, 2), "holds an object of torch.nn.modules.linear.Linear; save its state_dict"),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "loss": 0.1}, "'epoch' is none"),
        ({}, "holds nothing"),
        (torch.zeros(3), "holds a Tensor"),
    ):
        torch.save(content, tmp_path / "f.pt")
        with pytest.raises(CheckpointError, match=words):
            read_state_dict(tmp_path / "f.pt")
    (tmp_path / "f.pt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="refused|cannot be read"):
        read_state_dict(tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="name of a repository"):
        read_state_dict("state-spaces/mamba-130m")


def shards(folder, suffix=".safetensors", index=True):
    parts = [{"a.weight": STATE["a.weight"]}, {"a.bias": STATE["a.bias"]}]
    names = [f"{'model' if suffix == '.safetensors' else 'pytorch_model'}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for name, part in zip(names, parts):
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
    if index:
        table = {key: name for name, part in zip(names, parts) for key in part}
        stem = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": table}))
    return names


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path, suffix, index):
    names = shards(tmp_path, suffix, index)
    same(read_state_dict(tmp_path))
    (tmp_path / names[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=f"lacks {names[1]}"):
        same(read_state_dict(tmp_path))


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    shards(tmp_path)
    for table in ({"a": "../secret.safetensors"}, {"a": "/etc/passwd"}, {}, [], {"a": 3}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
        with pytest.raises(CheckpointError, match="refused|is no index"):
            read_state_dict(tmp_path)


def test_a_folder_of_several_checkpoints_is_not_merged(tmp_path):
    for name in ("vim_t_76p1.pth", "vim_t_ft_78p3.pth"):
        torch.save({"model": STATE}, tmp_path / name)
    with pytest.raises(CheckpointError, match="holds 2 checkpoints; name the file.*vim_t_76p1.pth, vim_t_ft_78p3.pth"):
        read_state_dict(tmp_path)
    torch.save(STATE, tmp_path / "pytorch_model.bin")  # a trainer's folder: one standard name among others
    torch.save({"step": 1}, tmp_path / "optimizer.pt")
    same(read_state_dict(tmp_path))


def test_what_a_trainer_saves_beside_is_no_checkpoint(tmp_path):
    torch.save(STATE, tmp_path / "weights.pt")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        torch.save({"step": 1}, tmp_path / name)
    same(read_state_dict(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "\0"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index|refused"):
        read_state_dict(tmp_path)


def test_a_tensor_whose_values_are_not_in_the_file_is_refused(tmp_path):
    """Never fresh memory in the place of what a file does not hold."""
    import zipfile

    torch.save(STATE, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "empty.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, b"" if "/data/" in entry.filename else old.read(entry))
    with pytest.raises(CheckpointError, match=r"shape \(3, 4\) has no values"):
        read_state_dict(tmp_path / "empty.pt")
    torch.save({"nothing": torch.empty(0, 3)}, tmp_path / "none.pt")
    same(read_state_dict(tmp_path / "none.pt"), {"nothing": torch.empty(0, 3)})


@pytest.mark.parametrize("suffix, said", [(".pth", "its last part is missing"), (".safetensors", "cut off or damaged")])
def test_half_a_file_is_named_as_that(tmp_path, suffix, said):
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    state = {"a": torch.randn(50, 50)}
    torch.save(state, whole) if suffix == ".pth" else save_file(state, whole)
    half.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=said):
        read_state_dict(half)


def test_a_folder_of_runs_names_them(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="it holds runs, name one: first, second"):
        read_state_dict(tmp_path)


def test_a_newer_format_of_checkpoints_is_named_as_that(tmp_path):
    (tmp_path / "manifest.json").write_text(f'{{"format": {FORMAT + 1}}}')
    with pytest.raises(CheckpointError, match="a newer ssmzoo wrote it, update this one"):
        read_manifest(tmp_path)
