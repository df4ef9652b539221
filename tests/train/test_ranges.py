"""Every number that a configuration may hold has a range, and what lies outside is refused before anything is built."""

import importlib
import inspect
import math
import pkgutil
import typing

import lightning as L
import pytest
from omegaconf import OmegaConf
from toy import TINY
from tried import tried

import ssmzoo.data
import ssmzoo.tasks
from ssmzoo.presets import config_dir, config_names, list_models, model_class, read_model_config
from ssmzoo.safe_yaml import read_yaml
from ssmzoo.tasks.base import Task
from ssmzoo.train.changes import flatten
from ssmzoo.train.config import CALLED, locate
from ssmzoo.train.ranges import ANY, CHECKED, MODEL, RANGES, Batches, numbers, out_of_range

NO_NUMBERS = ("optim.total_steps", "trainer.max_time")  # computed; a text, with a form of its own


def numeric(hint) -> bool:
    return hint in (int, float) or any(numeric(part) for part in typing.get_args(hint))


def numeric_arguments(called, node: str):
    hints = typing.get_type_hints(called.__init__ if inspect.isclass(called) else called)
    parameters = inspect.signature(called).parameters
    return {f"{node}.{p}" for p in parameters if numeric(hints.get(p))} - set(NO_NUMBERS)


def homes():
    """(what is called, its node) of trainer, optim, callbacks and of every data module and task of the package."""
    yield from ((locate(target), node) for node, target in CALLED.items())
    for package, kind, node in ((ssmzoo.data, L.LightningDataModule, "data"), (ssmzoo.tasks, Task, "task")):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(found.name)
            for member in vars(module).values():
                if inspect.isclass(member) and member.__module__ == found.name and issubclass(member, kind):
                    yield member, node


def test_every_numeric_argument_of_every_model_has_a_range():
    classes = {model_class(read_model_config(name)["model"]["_target_"]) for name in list_models()}
    known = {key.removeprefix("model.") for cls in classes for key in numeric_arguments(cls, "model")}
    tried("numeric arguments of models whose range has a name of its own", len(known & MODEL.keys()))
    assert len(classes) > 25 and len(known & MODEL.keys()) > 80
    for name in known:  # a new model needs no entry: whole numbers below zero and what is no number are refused anyway
        assert out_of_range({"model": {name: -3}}) or MODEL.get(name) is ANY, name
        assert out_of_range({"model": {"deeper": [{}, {name: math.nan}][1]}}), name


def test_every_numeric_argument_has_a_range():
    known = {key for called, node in homes() for key in numeric_arguments(called, node)}
    assert len(known) > 90 and not known - RANGES.keys()


@pytest.mark.parametrize(
    "file", [f for f in sorted(config_dir().rglob("*.yaml")) if f.parent.name != "hparams_search"], ids=lambda f: f.stem
)
def test_every_number_in_a_config_file_has_a_range_and_lies_in_it(file):
    content = {k: v for k, v in (read_yaml(file) or {}).items() if k not in ("defaults", "hydra")}
    group = file.relative_to(config_dir()).parts[0].removesuffix(".yaml")
    whole = "@package _global_" in file.read_text() or file.parent == config_dir()
    content = content if whole else {group: content}
    keys = [k for k, v in flatten(content).items() if k.split(".")[0] in CHECKED and list(numbers(v))]
    others = [k for k in keys if not k.startswith("model.")]
    lacking = [k for k in others if not any(k == known or k.startswith(f"{known}.") for known in RANGES)]
    assert not lacking and out_of_range(content) is None


def outside(expected):
    """Numbers that a range excludes."""
    if isinstance(expected, Batches):
        return [-1, 1.5]
    below = expected.low if "low" in expected.open else expected.low - 1
    found = [v for v in (below, -2) if not expected.holds(v)] + [math.nan]
    return found + ([expected.high + 1] if expected.high < math.inf else [])


EVERY = RANGES | {f"model.{name}": v for name, v in MODEL.items()} | {"model.deeper.d_state": MODEL["d_state"]}


@pytest.mark.parametrize("key", [k for k, v in EVERY.items() if v is not ANY])
def test_a_number_outside_is_named_with_what_was_expected(key):
    for value in outside(EVERY[key]):
        tried("numbers outside the range of their key")
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=0"]))
        node = plain
        for part in key.split(".")[:-1]:
            node = node[part]
        node[key.split(".")[-1]] = value
        assert out_of_range(plain)[0] == key, (key, value)


@pytest.mark.parametrize(
    "argument",
    [
        "trainer.accumulate_grad_batches=0",
        "trainer.devices=0",
        "trainer.max_time=abc",
        "trainer.gradient_clip_val=-1",
        "trainer.max_steps=-5",
        "trainer.log_every_n_steps=0",
        "trainer.limit_val_batches=1.5",
        "callbacks.ema.decay=2",
        "callbacks.early_stopping.patience=-1",
        "callbacks.checkpoint.keep_last=0",
        "callbacks.guards.max_skips=-1",
        "optim.betas=[0.9,1.5]",
        "data.batch_size=0",
        "task.sample_tokens=-1",
        "seed=-1",
        "model.d_model=0",
        "model.n_layer=-1",
        "model.ssm_cfg.d_state=0",
        "optim.lr=inf",
        "trainer.devices='0'",
        "trainer.devices=[]",
        "trainer.devices=[0,-1]",
        "trainer.devices=abc",
        "trainer.max_time={hours: -1}",
        "trainer.max_time={hour: 1}",
        "trainer.max_time={hours: 0}",
        "trainer.max_time=00:00:00:00",
        "trainer.max_time=5",
    ],
)
def test_on_the_command_line_nothing_is_written(call, tmp_path, argument):
    status, _, err = call("model=mamba", argument)
    key, _, value = argument.partition("=")
    assert status == 2 and err.count("\n") == 1 and f"{key} is " in err and "expected" in err, err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argument, word", [
    ("trainer.accelerator=abc", "accelerator"), ("trainer.strategy=abc", "strategy"),
    ("trainer.profiler=abc", "profiler"), ("trainer.gradient_clip_algorithm=abc", "gradient_clip_algorithm"),
    ("callbacks.ema.device=abc", "abc"),
    ("trainer.val_check_interval=0.5", "check_val_every_n_epoch=1"), ("trainer.barebones=true", "unknown key"),
    ("trainer.enable_checkpointing=true", "unknown key"), ("trainer.model_registry=abc", "unknown key"),
    ("logger=wandb logger.mode=abc", "logger.mode is 'abc'"), ("trainer=null", "chooses no file"),
    ("callbacks=null", "chooses no file"), ("model=null", "chooses no file"), ("--nothing", "--nothing"),
    ("-c x", "invalid choice"), ("runs_dir=FILE", "cannot be written"), ("name=' '", "give a name below runs_dir"),
    (f"name={'a' * 300}", "cannot be written"), ("name='a\nb'", "control characters"),
])  # fmt: skip
def test_what_is_found_when_the_loop_is_built_leaves_nothing_either(call, tmp_path, argument, word):
    (tmp_path / "FILE").write_text("mine")
    status, out, err = call(*TINY, *(argument.split(" ") if "'" not in argument else [argument]))
    assert status == 2 and err.count("\n") == 1 and word in err and "Traceback" not in out + err, err
    assert [f.name for f in tmp_path.iterdir()] == ["FILE"]


def test_every_config_group_is_walked():
    assert {"data", "task", "optim", "trainer", "callbacks"} <= set(CHECKED)
    assert all(config_names(group) for group in ("data", "task", "optim", "trainer", "callbacks"))
