"""What is typed when a run goes on: every key of every config is applied or refused, and what applies does act."""

import functools
import json
import shutil

import pytest
import toy
from test_config_keys import GROUPS, content
from test_ranges import homes
from tried import tried

from ssmzoo.presets import config_names
from ssmzoo.train import changes
from ssmzoo.train.changes import NOT_OF_THE_RUN, RULES, flatten, rule
from ssmzoo.train.config import FREE_ROOTS, LOGGER_KEYS, TOP_LEVEL

TINY = [*toy.TINY, "name=a"]


@functools.cache
def every_key() -> frozenset[str]:
    """Of every config file, and every argument of what they configure."""
    import inspect

    keys = set(TOP_LEVEL) - set(NOT_OF_THE_RUN)
    for group in GROUPS:
        for name in config_names(group):
            found, text = content(group, name)
            found = found if "@package _global_" in text else {group: found}
            keys |= {k for k in flatten(found) if k.split(".")[0] in FREE_ROOTS}
    for called, node in homes():
        keys |= {f"{node}.{p}" for p in inspect.signature(called).parameters}
    return frozenset(keys) | {f"logger.{key}" for kind in LOGGER_KEYS.values() for key in kind}


def test_every_key_of_every_config_falls_under_a_rule_and_every_rule_has_keys():
    keys = every_key()
    assert len(keys) > 200
    tried("keys of configurations under a rule for resume", len(keys))
    for key in keys:
        rule(key)
    with pytest.raises(KeyError):
        rule("sead")
    assert set(NOT_OF_THE_RUN) == {"resume", "config", "name", "runs_dir", "n_trials"}
    used = {next(p for p in RULES if changes.fnmatch.fnmatchcase(key, p)) for key in keys}
    assert set(RULES) == used


COMMAND = [*TINY, "trainer.gradient_clip_val=0.5", "callbacks.early_stopping.patience=7"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that train.py is started in."""
    from ssmzoo.cli.train import train

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["train", *COMMAND])
        train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, of this test alone."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/lstm/a"


REFUSED = [
    ("seed=7", "random states"),
    ("model.state_size=7", "weights were made"),
    ("data.max_length=9", "which sample comes next"),
    ("optim.name=sgd", "optimiser's state"),
    ("optim=muon", "optimiser's state"),
    ("optim.layer_decay=0.5", "optimiser's state"),
    ("callbacks.ema.decay=0.9", "average began"),
    ("init_from=nowhere", "weights of its own"),
    ("model=rnn", "weights were made"),
    ("name=b", "keeps its name"),
    ("runs_dir=elsewhere", "stays where it is"),
    ("experiment=pattern_search", "weights were made"),  # whose file chooses another model
    ("experiment=finetune/image", "weights were made"),  # and another task
]


@pytest.mark.parametrize("typed, reason", REFUSED, ids=[t for t, _ in REFUSED])
def test_what_is_fixed_is_refused_in_one_line_and_the_run_stays_as_it_was(call, run, typed, reason):
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file()}
    status, _, err = call(f"resume={run}", typed, "trainer.max_steps=6")
    assert status == 2 and err.count("\n") == 1 and reason in err, err
    assert {f: f.read_bytes() for f in run.rglob("*") if f.is_file()} == before


def test_a_run_goes_on_after_a_refusal(call, run):
    assert call(f"resume={run}", "seed=7", "trainer.max_steps=6")[0] == 2
    status, out, _ = call(f"resume={run}", "trainer.max_steps=6")
    assert status == 0 and "trainer.max_steps=6 (was 4)" in out


def test_what_may_change_acts_from_the_first_step_on(call, run):
    import torch

    from ssmzoo.train.logger import read_metrics

    new = ["optim.lr=0.5", "optim.weight_decay=0.25", "optim.betas=[0.5,0.6]", "optim.schedule_kind=constant"]
    more = ["optim.warmup_steps=0", "trainer.max_steps=6", "callbacks.early_stopping.patience=3"]
    status, out, err = call(f"resume={run}", *new, *more)
    assert status == 0, err
    assert "optim.lr=0.5 (was 0.003)" in out
    rates = {int(r["step"]): r["optim/lr"] for r in read_metrics(run / "metrics.csv") if "optim/lr" in r}
    assert rates[5] == rates[6] == 0.5 and rates[4] < 0.1
    last = run / "checkpoints" / json.loads((run / "checkpoints/index.json").read_text())["last"]
    state = torch.load(last / "trainer.ckpt", weights_only=True)
    group = state["optimizer_states"][0]["param_groups"][0]
    assert (group["lr"], group["betas"]) == (0.5, (0.5, 0.6)) and group["weight_decay"] in (0.25, 0.0)
    stopping = next(v for k, v in state["callbacks"].items() if "EarlyStopping" in k)
    assert stopping["patience"] == 3


def test_the_same_command_again_changes_nothing(call, run):
    status, out, _ = call(*COMMAND, "resume=auto")
    assert status == 0 and "is finished" in out and "goes on with" not in out
