"""Command lines that cannot work, generated for every command and every key: status 2, one line, nothing written."""

import argparse
import copy
import inspect
import typing
from collections import abc

import pytest
from omegaconf import OmegaConf
from paths import ROOT
from test_changes import every_key
from tried import tried

from ssmzoo.cli.main import build_parser
from ssmzoo.presets import config_dir, config_names, model_class, read_model_config
from ssmzoo.safe_yaml import read_yaml
from ssmzoo.train.config import CALLED, FREE_ROOTS, ConfigError, check, locate, register_resolvers
from ssmzoo.train.ranges import RANGES

RUN = ROOT / "tests/train/old_runs/language"
TEXTS = ("", "no such thing", "/no/such/place", "..")
EXECUTED = ("bench", "backends", "doctor", "verify")  # whose options are tried without being run to the end


def refused(call, tmp_path, arguments, entry):
    tried("command lines that cannot work")
    before = sorted(tmp_path.rglob("*"))
    status, out, err = call(*arguments, entry=entry)
    shown = f"{entry} {arguments}: status {status}\n{out}{err}"
    assert status == 2 and len(err.strip().splitlines()) == 1 and err.startswith("error: "), shown
    assert "Traceback" not in out + err and sorted(tmp_path.rglob("*")) == before, shown


# --- the console script


def leaves(parser, path=()):
    """(words, parser) of every command and of every action below one, read off argparse."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield list(path), parser
    for action in below:
        for name, child in action.choices.items():
            if name not in ("train", "eval"):
                yield from leaves(child, (*path, name))


COMMANDS = list(leaves(build_parser()))
NAMES = [" ".join(words) for words, _ in COMMANDS]


def positionals(parser):
    return [a for a in parser._actions if not a.option_strings and a.nargs not in ("*", "?")]


def required(parser, file) -> list[str]:
    """Options that must be given, with some value."""
    wanted = [a for a in parser._actions if a.option_strings and a.required]
    return [word for a in wanted for word in (a.option_strings[-1], str(file))]


@pytest.mark.parametrize("words, parser", COMMANDS, ids=NAMES)
def test_an_unknown_option_is_refused(call, tmp_path, words, parser):
    given = [*words, *(str(RUN) for _ in positionals(parser)), *required(parser, tmp_path / "new")]
    refused(call, tmp_path, [*given, "--no-such-option"], "ssmzoo")
    refused(call, tmp_path, [*given, "-Q"], "ssmzoo")


@pytest.mark.parametrize("words, parser", COMMANDS, ids=NAMES)
def test_a_missing_argument_is_refused(call, tmp_path, words, parser):
    if positionals(parser):
        refused(call, tmp_path, [*words, *required(parser, tmp_path / "new")], "ssmzoo")
    for option in (a for a in parser._actions if a.option_strings and a.required):
        others = [a for a in parser._actions if a.required and a.option_strings and a is not option]
        values = [word for a in others for word in (a.option_strings[-1], "x")]
        refused(call, tmp_path, [*words, *(str(RUN) for _ in positionals(parser)), *values], "ssmzoo")


@pytest.mark.parametrize("words, parser", COMMANDS, ids=NAMES)
def test_what_is_not_there_is_refused(call, tmp_path, words, parser):
    for i, _ in enumerate(wanted := positionals(parser)):
        for text in TEXTS:
            values = [text if i == j else str(RUN) for j in range(len(wanted))]
            refused(call, tmp_path, [*words, *values, *required(parser, tmp_path / "new")], "ssmzoo")


def bad_values(action) -> list[str]:
    if action.choices is not None:
        return ["no such thing", ""]
    return ["many", "", "1.5.2"] if action.type in (int, float) else []


@pytest.mark.parametrize("words, parser", COMMANDS, ids=NAMES)
def test_a_value_of_the_wrong_type_is_refused(call, tmp_path, words, parser):
    for action in parser._actions:
        for value in bad_values(action) if action.option_strings and action.nargs != 0 else ():
            given = [*words, *(str(RUN) for _ in positionals(parser)), *required(parser, tmp_path / "new")]
            refused(call, tmp_path, [*given, action.option_strings[-1], value], "ssmzoo")


@pytest.mark.parametrize("command", ["", "no such thing", "/bin/sh", "..", "Info", "trian"])
def test_an_unknown_command_is_refused(call, tmp_path, command):
    refused(call, tmp_path, [command], "ssmzoo")


# --- configuration keys


def kinds(hint) -> set:
    return {k for part in typing.get_args(hint) for k in kinds(part)} if typing.get_args(hint) else {hint}


def wrong_values(hint) -> list:
    """Plain values that an argument of this type cannot take; none where anything may be meant."""
    if typing.get_origin(hint) in (dict, abc.Mapping):
        return ["no such thing", 3, [1]]
    of = kinds(hint) - {type(None)}
    if of and of <= {int, float}:
        return ["no such thing", "", {"a": 1}, True, *([] if typing.get_args(hint) else [[1]])]
    if of == {bool}:
        return ["no such thing", "", 3, 0.5, {"a": True}, [True]]
    return [3, {"a": "b"}, True] if of == {str} and typing.get_origin(hint) is not typing.Literal else []


def targets():
    """(group, name of one configuration of it, class) for every class that a file of model, data or task names."""
    seen = set()
    for group in ("model", "data", "task"):
        for name in config_names(group):
            target = (
                read_model_config(name)["model"]["_target_"]
                if group == "model"
                else (read_yaml(config_dir() / group / f"{name}.yaml") or {}).get("_target_")
            )
            if target and target not in seen:
                seen.add(target)
                yield group, name, model_class(target) if group == "model" else locate(target)


def compose(*arguments):
    import hydra

    register_resolvers()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = hydra.compose("train", list(arguments))
    OmegaConf.set_struct(cfg, False)
    return cfg


def hold(cfg, node: str, called, skipped=()) -> int:
    """`check` refuses every wrong value of every typed argument, and names that do not exist; returns how many."""
    hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    count = 0
    names = [p for p in inspect.signature(called).parameters if p not in ("self", *skipped)]
    wrong = [(p, value) for p in names for value in wrong_values(hints.get(p, typing.Any))]
    before = copy.deepcopy(OmegaConf.select(cfg, node))
    for name, value in [*wrong, *((f"{p}x", 1) for p in names if f"{p}x" not in names)]:
        OmegaConf.update(cfg, node, copy.deepcopy(before), merge=False)
        OmegaConf.update(cfg, f"{node}.{name}", value, force_add=True, merge=False)
        said = checked(cfg)
        assert f"{node}.{name}" in said and "\n" not in said, f"{node}.{name}={value!r} ({hints.get(name)}): {said}"
        count += 1
    tried("wrong or misspelt keys", count)
    return count


def checked(cfg) -> str:
    """What is said of a configuration; empty when it passes."""
    try:
        check(cfg)
    except ConfigError as error:
        return str(error)
    return ""


INJECTED = {"task": ("model", "optim"), "optim": ("model", "total_steps"), "callbacks.checkpoint": ("folder",)}


@pytest.mark.parametrize("group, name, called", list(targets()), ids=lambda v: v if isinstance(v, str) else "")
def test_arguments_of_every_class_are_held_to_their_types(group, name, called):
    skipped = INJECTED.get(group, ())
    own = [p for p in inspect.signature(called).parameters if p not in skipped]
    assert hold(compose(f"{group}={name}"), group, called, skipped) > 0 or not own


@pytest.mark.parametrize("node", [n for n in CALLED])
def test_arguments_of_every_other_node_are_held_to_their_types(node):
    cfg = compose("model=lstm")
    if OmegaConf.select(cfg, node) is None:
        OmegaConf.update(cfg, node, {}, force_add=True)
    skipped = ("folder", "run_dir", "monitor", "mode", "model", "total_steps", "callbacks", "logger", "plugins")
    hold(cfg, node, locate(CALLED[node]), (*skipped, "default_root_dir", "kwargs", "avg_fn"))


def test_every_argument_of_every_class_is_annotated():
    every = [(called, INJECTED.get(group, ())) for group, _, called in targets()]
    every.append((locate(CALLED["optim"]), INJECTED["optim"]))
    for called, skipped in every:
        hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
        lacking = [p for p in inspect.signature(called).parameters if p not in hints and p not in skipped]
        assert not lacking, called


class Accepted(BaseException):
    pass


@pytest.fixture
def nothing_begins(monkeypatch):
    """A run that would begin, and write its first file, ends here instead."""

    def begin(*_):
        raise Accepted

    monkeypatch.setattr("ssmzoo.train.run.begin", begin)


def lines(key: str) -> list[str]:
    """One bad value a key for the whole way from the command line; the values of each kind are tried above."""
    if key in RANGES or key in ("compile", "grad_checkpointing", "seed"):
        return [f"{key}=no such thing", f"{key}="]
    return [f"{key}.deeper=1", f"{key}x=1"] if key.split(".")[0] in FREE_ROOTS else [f"{key}x=1"]


NODES = sorted({k.rpartition(".")[0] if "." in k else k for k in every_key()})


@pytest.mark.parametrize("node", NODES)
def test_one_bad_key_of_every_node_on_the_command_line(call, tmp_path, nothing_begins, node):
    keys = [k for k in sorted(every_key()) if node in (k, k.rpartition(".")[0])]
    for line in lines(keys[len(keys) // 2]):
        refused(call, tmp_path, ["model=mamba", line], "train")


@pytest.mark.parametrize("group", ["model", "task", "data", "optim", "trainer", "logger", "callbacks", "experiment"])
@pytest.mark.parametrize("value", [v for v in TEXTS if v] + ["../../etc", "{a: 1}"])
def test_a_choice_that_is_not_there(call, tmp_path, nothing_begins, group, value):
    refused(call, tmp_path, [f"{group}={value}"], "train")


@pytest.mark.parametrize("text", ["=3", "foo", "optim.lr={a:", "model=a,b{", "+++x=1", "model=\x1b[2J", "runs_dir=''"])
def test_what_is_no_key_and_value(call, tmp_path, nothing_begins, text):
    refused(call, tmp_path, [text], "train")


@pytest.mark.parametrize("key", ["resume", "config", "init_from", "ckpt"])
@pytest.mark.parametrize("value", ["no such thing", "/no/such/place", "..", "''", "[a]", "3"])
def test_a_folder_that_is_no_run(call, tmp_path, nothing_begins, key, value):
    refused(
        call, tmp_path, [f"{key}={value}", *([] if key == "ckpt" else ["model=lstm"])], ["train", "eval"][key == "ckpt"]
    )
