"""Birdie from the command line: the mixture moves, a resumed run is the same, models that read one way train too."""

import copy
import csv

import pytest
import torch
from safetensors.torch import load_file

from ssmzoo.models.mamba import MambaLM
from ssmzoo.tasks.birdie import Birdie
from ssmzoo.tasks.mixture_controller import ControllerSettings, MixtureController
from ssmzoo.tasks.objectives.birdie import reward

TEXT = "".join(f"line {i} says {i * 7919 % 1000} and {i * 104729 % 977}\n" for i in range(4000))
TINY = ["data=birdie", "data.seq_len=384", "data.batch_size=2", "++data.val_rows=1", "name=a",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "++task.sample_tokens=8"]  # fmt: skip
CONTROL = ["++task.controller.uniform_steps=1", "++task.controller.updates=3", "++task.controller.hidden=8"]
MODELS = {
    "gated_ssm": ["model.d_model=16", "model.d_state=16", "model.n_layer=2"],
    "hawk": ["model.d_model=16", "model.d_state=16", "model.n_layer=2"],
    "transformer": ["model.d_model=16", "model.n_blocks=1", "model.n_heads=2"],
    "mamba": ["model.d_model=16", "model.n_layer=1"],
    "mamba2": ["model.d_model=32", "model.n_layer=1"],
}


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return [f"data.path={tmp_path / 'text.txt'}", f"++data.cache_dir={tmp_path / 'cache'}"]


def history(run):
    return list(csv.DictReader((run / "mixture.csv").open()))


def weights(row):
    return [float(v) for k, v in row.items() if k.startswith("weight/")]


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_causal_model_trains_on_the_mixture(call, tmp_path, text, model):
    run = tmp_path / "runs" / model / "a"
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2"]
    status, out, err = call(f"model={model}", *MODELS[model], *TINY, *CONTROL, *steps, *text)
    assert status == 0, err
    both = model in ("gated_ssm", "hawk", "transformer")
    assert f"read in {'both directions' if both else 'one direction'}" in out and "moved by the rewards" in out
    rows = history(run)
    assert [row["step"] for row in rows] == ["2", "4"] and len(weights(rows[0])) == 16
    assert all(abs(sum(weights(row)) - 1) < 1e-4 for row in rows) and (run / "mixture.png").stat().st_size > 0
    if model == "gated_ssm":
        status, out, err = call(f"ckpt={run}", f"out={tmp_path / 'again'}", entry="eval")
        assert status == 0, err
        lines = list(csv.DictReader((tmp_path / "again" / "objectives.csv").open()))
        assert len(lines) == 16 and all(row["both_directions"] != row["one_direction"] for row in lines[1:])


def test_a_resumed_run_is_bitwise_the_same_and_its_mixture_goes_on(call, tmp_path, text):
    found = []
    for folder, steps in (("whole", [8]), ("parts", [4, 8])):
        run = tmp_path / folder / "gated_ssm" / "a"
        for i, n in enumerate(steps):
            first = ["model=gated_ssm", *MODELS["gated_ssm"], *TINY, *CONTROL, *text, f"runs_dir={tmp_path / folder}"]
            first += ["trainer.val_check_interval=2"]
            again = [f"resume={run}"]
            status, _, err = call(*(again if i else first), f"trainer.max_steps={n}")
            assert status == 0, err
        found.append((run, history(run), load_file(next(run.glob("checkpoints/*8/model.safetensors")))))
    (_, whole, whole_weights), (_, parts, parts_weights) = found
    assert whole == parts and weights(whole[1]) == weights(whole[0]) != weights(whole[2]) != weights(whole[3])
    assert all(torch.equal(v, parts_weights[k]) for k, v in whole_weights.items())


@pytest.mark.parametrize("mixture", ["fixed", "next_token"])
def test_the_weights_of_other_mixtures_stay(call, tmp_path, text, mixture):
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=2", f"data.mixture={mixture}"]
    status, out, err = call("model=gated_ssm", *MODELS["gated_ssm"], *TINY, *CONTROL, *steps, *text)
    assert status == 0 and "its weights stay" in out, err
    rows = history(tmp_path / "runs" / "gated_ssm" / "a")
    assert weights(rows[0]) == weights(rows[1])


def test_what_cannot_be_is_refused_in_words(call, text):
    status, _, err = call("model=mamba", *MODELS["mamba"], *TINY, "task.bidirectional=true", *text)
    assert status == 2 and "task.bidirectional=true: MambaLM reads in one direction only" in err
    status, _, err = call("model=gated_ssm", *TINY, "++task.controller.hiden=3", *text)
    assert status == 2 and "task.controller.hiden is unknown" in err and "hidden" in err
    status, _, err = call("model=gated_ssm", *TINY, "++task.controller.best=9999", *text)
    assert status == 2 and "best may not exceed candidates" in err
    with pytest.raises(ValueError, match="one direction only"):
        Birdie(MambaLM(16, 16, 1), bidirectional=True)


def test_losses_that_fall_are_rewarded():
    """The published example: 4.5 -> 4.2 is worth about as much as 0.6 -> 0.5207."""
    old, new = torch.tensor([4.5, 0.6, 1.0, 1.0, float("nan")]), torch.tensor([4.2, 0.5207, 1.0, 1.1, 1.0])
    found = reward(old, new)
    assert found[0] > 0 and abs(found[0] - found[1]) < 0.02 and found[2] == 0 and found[3] < 0 and found[4] == 0


def test_the_controller_finds_the_objective_that_pays():
    """A world in which a loss falls by what its objective is trained on, and only the first one can fall."""
    settings = ControllerSettings(uniform_steps=0, updates=30, hidden=16, candidates=512, best=8)
    controller = MixtureController(["a", "b", "c"], settings, seed=3)
    losses, action = [3.0, 3.0, 3.0], [1 / 3] * 3
    before = torch.get_rng_state()
    for step in range(14):
        action = controller.choose(step, losses, action)
        losses = [losses[0] * (1 - 0.15 * action[0]), losses[1] * (1 + 0.1 * action[1]), losses[2]]
    assert torch.equal(torch.get_rng_state(), before)  # other random numbers of the run are not touched
    late = torch.tensor(controller.actions[-5:]).mean(0)
    assert late[0] > 0.5 > 0.3 > late[1] and abs(sum(action) - 1) < 1e-6
    again = MixtureController(["a", "b", "c"], settings, seed=99)
    again.load_state_dict(copy.deepcopy(controller.state_dict()))
    again.seed = controller.seed
    assert again.choose(20, losses, action) == controller.choose(20, losses, action)
