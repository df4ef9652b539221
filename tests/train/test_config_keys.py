"""Every key of every config: explained by a comment or by its constructor's documentation, and typed there."""

import functools
import importlib
import inspect
import re
import shutil
import typing
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from ssmzoo.presets import config_dir, config_names, model_class
from ssmzoo.train.config import CALLED, LOGGER_KEYS, TOP_LEVEL, check, locate, register_resolvers

GROUPS = ("callbacks", "data", "logger", "model", "optim", "task", "trainer")


@functools.cache
def content(group: str, name: str) -> tuple[dict, str]:
    """Keys of a file and of those it inherits, and their texts."""
    text = (config_dir() / group / f"{name}.yaml").read_text()
    found = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
    for parent in found.pop("defaults", []):
        if isinstance(parent, str) and parent != "_self_":
            above, more = content(group, parent.removeprefix(f"/{group}/"))
            below = {k: above[k] | v if isinstance(v, dict) and k in above else v for k, v in found.items()}
            found, text = above | below, text + more
    return found, text


def commented(key: str, text: str) -> bool:
    """`key: value  # what it is`, or `group: null  # {key: value} ...`"""
    return re.search(rf"^\s*{re.escape(key)}:.*\s#|#.*{{{re.escape(key)}:", text, re.M) is not None


def documented(key: str, called) -> bool:
    """Is the key a word of the docstring, of the class, its bases or its module, or of a function it refers to?"""
    homes = [called]
    if inspect.isclass(called):
        homes = [*inspect.getmro(called), called.__init__, importlib.import_module(called.__module__)]
    else:
        known = called.__globals__
        homes += [known[name] for name in re.findall(r"`(\w+)`", called.__doc__) if name in known]
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


def recipe(group, name):
    """(configuration, what was chosen in each group)"""
    import hydra

    register_resolvers()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        free = name.startswith(("imagenet/", "dense/"))  # these leave the choice to the user
        model = ["model=shuffle_mamba"] if free else []
        cfg = hydra.compose("train", [f"{group}={name}", *model], return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    return cfg, cfg.pop("hydra").runtime.choices


@pytest.mark.parametrize("group, name", [(g, n) for g in ("experiment", "debug") for n in config_names(g)])
def test_every_key_of_a_recipe_is_known_typed_and_explained_there_or_at_home(group, name):
    cfg, chosen = recipe(group, name)
    check(cfg)  # unknown keys and wrong types
    found, text = content(group, name)
    missing = []
    for node, keys in found.items():
        if node in TOP_LEVEL:
            continue
        for path, value in [(f"{node}.{k}", v) for k, v in keys.items()] if node == "callbacks" else [(node, keys)]:
            target = CALLED.get(path) or cfg[node]["_target_"]
            called = model_class(target) if node == "model" else locate(target)
            home = content(node, chosen[node])[1]
            for key in set(value or ()) - {"_target_"}:
                if not (commented(key, text) or commented(key, home) or documented(key, called)):
                    missing.append(f"{path}.{key} is not explained")
                if node != "trainer" and not typed(key, called):
                    missing.append(f"{path}.{key} has no type")
    assert not missing


@pytest.mark.parametrize("name", config_names("hparams_search"))
def test_every_key_of_a_search_is_explained_in_its_file(name):
    def keys(node):
        for key, value in node.items():
            yield from keys(value) if isinstance(value, dict) and key != "params" else [key]

    found, text = content("hparams_search", name)
    assert not [key for key in keys(found) if not commented(key, text)]


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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model.d_modell=8"], ["from 'model.d_modell=8' on the command line", "nearest: d_model"]),
        (["optim.lr=fast"], ["optim.lr is 'fast' (str) (from 'optim.lr=fast'", "expected float"]),
        (
            ["trainer=fsdp", "optim=muon"],
            [
                "trainer.strategy=fsdp (from configs/trainer/fsdp.yaml) with "
                "optim.name=muon (from configs/optim/muon.yaml)",
                "use trainer=ddp",
            ],
        ),
        (["trainer=fsdp", "callbacks.ema.decay=0.9"], ["fsdp.yaml) with callbacks.ema"]),
        (["trainer.accelerator=cpu", "trainer.precision=16-mixed"], ["precision=16-mixed (from", "on a CPU cannot"]),
        (["callbacks.profile.step=3"], ["callbacks.profile.step", "nearest: steps"]),
        (["callbacks.ema.dekay=0.9"], ["callbacks.ema.dekay (from", "nearest: decay"]),
        (["callbacks.early_stopping.patiance=3"], ["from 'callbacks.early_stopping.patiance=3'", "nearest: patience"]),
        (["logger=wandb", "logger.projekt=x"], ["from 'logger.projekt=x' on the command line", "nearest: project"]),
        (["seed=many"], ["seed is 'many' (str) (from 'seed=many' on the command line); expected int"]),
        (["sead=1"], ["unknown key 'sead' on the command line", "nearest: seed"]),
    ],
)
def test_what_cannot_work_is_refused_by_key_and_origin(arguments, words, call, tmp_path):
    status, _, error = call("model=mamba", *arguments)
    assert status == 2 and not list(tmp_path.iterdir())
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "file, text, choice, words",
    [
        (
            "experiment/mine.yaml",
            "model: {d_modell: 8}",
            "experiment=mine",
            ["unknown key model.d_modell (from configs/experiment/mine.yaml)", "nearest: d_model"],
        ),
        (
            "experiment/deep/mine.yaml",
            "callbacks: {guards: {spikes: 2}}",
            "experiment=deep/mine",
            ["callbacks.guards.spikes (from configs/experiment/deep/mine.yaml)", "nearest: spike"],
        ),
        (
            "experiment/mine.yaml",
            "optim: {lr: fast}\ndata: {seq_len: 8}",
            "experiment=mine",
            ["optim.lr is 'fast' (str) (from configs/experiment/mine.yaml); expected float"],
        ),
        (
            "experiment/mine.yaml",
            "sead: 1",
            "experiment=mine",
            ["unknown key 'sead' (from configs/experiment/mine.yaml)", "nearest: seed"],
        ),
        (
            "model/large.yaml",
            "defaults: [small, _self_]",
            "model=large",
            ["unknown key model.widht (from configs/model/small.yaml)"],
        ),
        (
            "optim/mine.yaml",
            "defaults: [adamw, _self_]\nwarmup: 5",
            "optim=mine",
            ["unknown key optim.warmup (from configs/optim/mine.yaml)", "nearest: warmup_steps"],
        ),
    ],
)
def test_a_wrong_key_in_a_file_is_refused_with_the_file(file, text, choice, words, call, tmp_path, monkeypatch):
    copy = tmp_path / "configs"
    shutil.copytree(config_dir(), copy)
    (copy / "model/small.yaml").write_text("# @package _global_\ndefaults: [mamba, _self_]\nmodel: {widht: 8}\n")
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).write_text(f"# @package _global_\n{text}\n" if not file.startswith("optim") else text)
    for module in ("ssmzoo.presets", "ssmzoo.train.config", "ssmzoo.cli.train"):
        monkeypatch.setattr(f"{module}.config_dir", lambda: copy)
    status, _, error = call(*([] if choice.startswith("model") else ["model=mamba"]), choice)
    assert status == 2 and not (tmp_path / "runs").exists()
    for word in words:
        assert word in error
