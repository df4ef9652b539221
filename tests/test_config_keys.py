"""Every key of every config: explained by a comment or by its constructor's documentation, and typed there."""

import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest
import yaml

from ssmzoo.train.config import CALLED, LOGGER_KEYS, TOP_LEVEL, locate
from ssmzoo.zoo import config_dir, config_names, model_class

GROUPS = ("callbacks", "data", "logger", "model", "optim", "task", "trainer")


def content(group: str, name: str) -> tuple[dict, str]:
    """Keys of a file and of those it inherits, and their texts."""
    text = (config_dir() / group / f"{name}.yaml").read_text()
    found = yaml.safe_load(text) or {}
    for parent in found.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            above, more = content(group, parent)
            below = {k: above[k] | v if isinstance(v, dict) and k in above else v for k, v in found.items()}
            found, text = above | below, text + more
    return found, text


def commented(key: str, text: str) -> bool:
    return re.search(rf"^\s*{re.escape(key)}:.*\s#", text, re.M) is not None


def documented(key: str, called) -> bool:
    """Is the key a word of the docstring, of the class, its bases or its module?"""
    homes = [called]
    if inspect.isclass(called):
        homes = [*inspect.getmro(called), importlib.import_module(called.__module__)]
    return any(re.search(rf"\b{re.escape(key)}\b", home.__doc__ or "") for home in homes)


def typed(key: str, called) -> bool:
    parameters = inspect.signature(called).parameters
    hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    given = parameters[key].default if key in parameters else inspect.Parameter.empty
    return key in hints or given not in (inspect.Parameter.empty, None)


def nodes(group: str, name: str):
    """(what the keys are arguments of, keys, text) of a file."""
    found, text = content(group, name)
    if group in ("model", "task") and group in found:
        found = found[group]
    if group == "callbacks":
        for node, keys in found.items():
            if isinstance(keys, dict):
                yield locate(CALLED[f"callbacks.{node}"]), keys, text
        return
    if group == "logger":
        yield None, {k: v for k, v in found.items() if k != "kind"}, text
        return
    target = CALLED.get(group) or found["_target_"]
    called = model_class(target) if group == "model" else locate(target)
    yield called, {k: v for k, v in found.items() if k != "_target_"}, text


@pytest.mark.parametrize("group, name", [(g, n) for g in GROUPS for n in config_names(g)])
def test_every_key_is_explained_and_typed(group, name):
    missing = []
    for called, keys, text in nodes(group, name):
        for key in keys:
            if called is None:
                assert key in LOGGER_KEYS[name]
            if not (commented(key, text) or (called is not None and documented(key, called))):
                missing.append(f"{key} is not explained")
            if called is not None and group != "trainer" and not typed(key, called):
                missing.append(f"{key} has no type")
    assert not missing


ENTRIES = [("train", TOP_LEVEL), ("eval", ("ckpt", "which", "data", "task", "out", "seed"))]


@pytest.mark.parametrize("name, known", ENTRIES)
def test_every_key_of_the_entries_says_type_and_meaning(name, known):
    text = (config_dir() / f"{name}.yaml").read_text()
    keys = [k for k in yaml.safe_load(text) if k not in ("defaults", "hydra")]
    assert set(keys) <= set(known)
    for key in keys:
        assert re.search(rf"^{key}:.*# (str|int|bool|dict|float): \S", text, re.M), key


@pytest.mark.parametrize("file", sorted(config_dir().rglob("*.yaml")), ids=lambda f: str(f.relative_to(config_dir())))
def test_every_file_begins_by_saying_what_it_is(file):
    lines = [line for line in Path(file).read_text().splitlines() if "@package" not in line]
    assert lines[0].startswith("# ") and len(lines[0]) > 8


@pytest.mark.parametrize("arguments, words", [
    (["model.d_modell=8"], ["from 'model.d_modell=8' on the command line", "nearest: d_model"]),
    (["optim.lr=fast"], ["optim.lr is 'fast' (str) (from 'optim.lr=fast'", "expected float"]),
    (["trainer=fsdp", "optim=muon"], ["trainer.strategy=fsdp with optim.name=muon", "use trainer=ddp"]),
    (["trainer=fsdp", "callbacks.ema.decay=0.9"], ["trainer.strategy=fsdp with callbacks.ema"]),
    (["trainer.accelerator=cpu", "trainer.precision=16-mixed"], ["16-mixed on a CPU"]),
    (["callbacks.profile.step=3"], ["callbacks.profile.step", "nearest: steps"]),
])
def test_what_cannot_work_is_refused_by_key_and_origin(arguments, words, monkeypatch, capsys, tmp_path):
    import sys

    from ssmzoo.cli import train

    monkeypatch.setattr(sys, "argv", ["train.py", "model=mamba", *arguments, f"runs_dir={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        train.train()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not list(tmp_path.iterdir())
    for word in words:
        assert word in error
