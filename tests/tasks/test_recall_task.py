"""Recall from the command line: data picks the task, every bench and kind of model trains, and the report per size."""

import csv

import numpy as np
import pytest
import torch

from ssmzoo.data.recall.benches import BENCHES
from ssmzoo.data.recall.data import RecallData
from ssmzoo.models.mamba import MambaLM
from ssmzoo.presets import config_dir
from ssmzoo.tasks.metrics.recall import CaseTable, example_accuracy, memory_point
from ssmzoo.tasks.recall import Recall
from ssmzoo.train.config import paired_overrides

SMALL = ["trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "name=a",
         "data.batch_size=4", "data.val_samples=4", "data.test_samples=4"]  # fmt: skip
SIZES = ["data.train=[[16,2]]", "data.test=[[16,2],[16,4],[32,4]]"]
MODELS = {
    "mamba": ["model.d_model=16", "model.n_layer=1"],
    "mamba2": ["model.d_model=32", "model.n_layer=1"],
    "transformer": ["model.d_model=16", "model.n_blocks=1", "model.n_heads=2"],
    "moe_mamba": ["model.d_model=16", "model.n_blocks=1"],
    "lstm": [],
    "sd_ssm": [],
}


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_trains_on_mqar(call, tmp_path, model):
    status, out, err = call(f"model={model}", "data=mqar", f"runs_dir={tmp_path}", *SMALL, *SIZES, *MODELS[model])
    assert (status, err) == (0, ""), err
    run = tmp_path / model / "a"
    rows = list(csv.DictReader((run / "recall.csv").open()))
    assert [(int(r["length"]), int(r["pairs"])) for r in rows] == [(16, 2), (16, 4), (32, 4)]
    assert all(0 <= float(r["accuracy"]) <= 1 and r["examples"] == "4" for r in rows)
    assert (
        (run / "recall.png").stat().st_size > 0 and "beyond the trained sizes" in out and "mqar, every test size" in out
    )


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_trains_by_its_name(call, tmp_path, bench):
    (tmp_path / "hay.txt").write_text("a line of text\n" * 3000)
    hay = [f"data.haystack={tmp_path / 'hay.txt'}"] if bench == "needle" else []
    cases = [
        f"data.{side}={[list(case) for case in BENCHES[bench].train[:1]]}".replace(" ", "")
        for side in ("train", "test")
    ]
    arguments = ["model=mamba", *MODELS["mamba"], f"data={bench}", f"runs_dir={tmp_path}", *SMALL, *cases, *hay]
    status, out, err = call(*arguments)
    assert (status, err) == (0, ""), err
    assert f"{bench}, every test size" in out
    status, out, err = call(f"ckpt={tmp_path / 'mamba' / 'a'}", f"out={tmp_path / 'again'}", entry="eval")
    assert status == 0 and (tmp_path / "again" / "recall.csv").exists()


def test_recall_resumes_with_the_same_losses(call, tmp_path):
    common = ["model=mamba", *MODELS["mamba"], "data=mqar", *SMALL[1:], *SIZES]
    losses = []
    for folder, steps in (("whole", [6]), ("parts", [4, 6])):
        for i, n in enumerate(steps):
            first = [*common, f"runs_dir={tmp_path / folder}", f"trainer.max_steps={n}", "trainer.log_every_n_steps=1"]
            again = [f"resume={tmp_path / folder / 'mamba' / 'a'}", f"trainer.max_steps={n}"]
            assert call(*(again if i else first))[0] == 0
        rows = csv.DictReader((tmp_path / folder / "mamba" / "a" / "metrics.csv").open())
        losses.append([row["train/cross_entropy"] for row in rows if row.get("train/cross_entropy")][-2:])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_typed_task_wins_and_a_model_of_another_kind_is_refused(call, tmp_path):
    assert paired_overrides(["model=mamba", "data=mqar"])[-1] == "task=recall"
    assert paired_overrides(["data=mqar,parity", "-m"])[-1] == "task=recall"
    for arguments in (
        ["data=mqar", "task=language"],
        ["data=mqar,text"],
        ["model=mamba"],
        ["data=digits"],
        ["data=nothing"],
    ):
        assert paired_overrides(arguments) == arguments
    status, _, err = call("model=vmamba", "data=mqar", f"runs_dir={tmp_path}", *SMALL)
    assert status == 2 and "the model needs in_chans" in err and err.count("\n") == 1
    status, _, err = call("model=mamba", "data=mqar", "data.train=[[16,8]]", f"runs_dir={tmp_path}", *SMALL)
    assert status == 2 and "8 pairs need a length of at least 32" in err and err.count("\n") == 1


def test_regular_languages_pick_their_task_for_language_models_too(call, tmp_path):
    for data in ("formal", "formal_words", "formal_fixedset"):
        assert paired_overrides([f"data={data}"])[-1] == "task=formal"
    assert {f.stem for f in (config_dir() / "data").glob("*.yaml")} >= set(BENCHES)


def test_accuracy_is_the_mean_over_examples_of_each_ones_share():
    asked = torch.tensor([[True, True, False, True], [True, False, False, False]])
    right = torch.tensor([[True, False, True, True], [False, True, True, True]])
    accuracy = example_accuracy(right, asked)
    assert torch.allclose(accuracy, torch.tensor([2 / 3, 0.0], dtype=torch.float64))
    table = CaseTable()
    for _ in range(2):
        table.add(torch.tensor([[64, 4], [64, 8]]), accuracy)
    table.add(torch.tensor([[64, 4]]), torch.tensor([0.0]))
    assert table.accuracy((64, 4)) == pytest.approx(4 / 9) and table.accuracy((64, 8)) == 0
    assert table.error((64, 4)) == pytest.approx(np.std([2 / 3, 2 / 3, 0]) / 3**0.5)
    assert table.mean([(64, 4), (64, 8), (1, 1)]) == pytest.approx(2 / 9) and np.isnan(table.mean([]))


class Oracle(torch.nn.Module):
    """Answers a token with the one that last stood behind it."""

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 300)
        for b, row in enumerate(ids.tolist()):
            behind = {}
            for t, token in enumerate(row):
                logits[b, t, behind.get(token, 0)] = 1
                if t:
                    behind[row[t - 1]] = token
        return type("Out", (), {"logits": logits, "state": None, "aux": {}})


def test_an_oracle_is_right_everywhere_and_a_guess_is_not(tmp_path):
    data = RecallData("forgetting_mqar", train=[[36, 4]], test=[[36, 4], [64, 4]], test_samples=20, batch_size=8)
    task = Recall(Oracle())
    table = task.cases(data)
    assert table.accuracy((36, 4)) == table.accuracy((64, 4)) == 1 and table.sums[36, 4][0] == 20
    out = task.step(data.training_batch(0), training=False)
    assert out.metrics["accuracy"] == 1 and out.count == 32 and task.state_bytes(data) == {}
    model = MambaLM(256, 16, 1)
    assert Recall(model).cases(data).accuracy((36, 4)) < 0.2
    held = Recall(model).state_bytes(data)
    assert held[36, 4][1] == held[64, 4][1] > 0 and held[64, 4][0] == 64


def test_runs_are_compared_by_the_state_that_they_carry(call, tmp_path):
    for model in ("mamba", "transformer"):
        arguments = [f"model={model}", "data=mqar", f"runs_dir={tmp_path}", *SMALL, *SIZES, *MODELS[model]]
        assert call(*arguments)[0] == 0
    held = {}
    for model in ("mamba", "transformer"):
        rows = list(csv.DictReader((tmp_path / model / "a" / "recall.csv").open()))
        held[model] = [int(row["state_bytes"]) for row in rows]
        assert memory_point(tmp_path / model / "a" / "recall.csv")[0] == pytest.approx(sum(held[model]) / 3)
    assert len(set(held["mamba"])) == 1 and held["transformer"][2] == 2 * held["transformer"][0]
    runs = [str(tmp_path / model / "a") for model in held]
    status, out, err = call("probe", "recall", runs[0], f"--out={tmp_path / 'probe'}", entry="ssmzoo")
    assert status == 0 and "recall: accuracy at distance" in out, err
    status, out, err = call("runs", "compare", *runs, f"--out={tmp_path / 'both.png'}", entry="ssmzoo")
    assert (status, err) == (0, "") and "accuracy against bytes of state in" in out
    assert (tmp_path / "both_memory.png").stat().st_size > 0
    (tmp_path / "mamba" / "a" / "recall.csv").write_text("length,pairs,accuracy\n16,2,0.5\n")  # of an older version
    status, out, _ = call("runs", "compare", *runs, f"--out={tmp_path / 'older.png'}", entry="ssmzoo")
    assert status == 0 and "bytes of state" not in out
