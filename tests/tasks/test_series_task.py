"""Anomaly detection from the command line, its two backward passes, stopping as published, and what the report says."""

import csv

import numpy as np
import pytest
import torch
from torch import nn
from toy import ToyData

from ssmzoo.models.maat import MAAT
from ssmzoo.tasks.base import StepOutput, Task
from ssmzoo.tasks.metrics.anomaly_table import find, table, verdict
from ssmzoo.tasks.series import AnomalyDetection, spread
from ssmzoo.tasks.series_baselines import BASELINES

SMALL = ["model.d_model=8", "model.n_heads=2", "model.d_ff=8", "model.e_layers=1", "data.window=50",
         "data.batch_size=4", "trainer.max_steps=4", "trainer.val_check_interval=2", "trainer.accelerator=cpu",
         "trainer.log_every_n_steps=1", "task.vus_window=5"]  # fmt: skip


@pytest.mark.parametrize("model", ["maat", "anomaly_transformer"])
def test_trains_resumes_and_evaluates(call, tmp_path, model):
    status, out, err = call(f"model={model}", "name=a", "runs_dir=.", *SMALL)
    assert (status, err) == (0, ""), err
    run = tmp_path / model / "a"
    for words in ("isolation forest", "moving z-score", "PCA", "raw F1", "the best baseline", "injected: "):
        assert words in out, words
    rows = list(csv.DictReader((run / "scores.csv").open()))
    assert len(rows) == 2480 and sum(int(r["label"]) for r in rows) > 100
    assert (run / "anomalies.png").stat().st_size > 10_000
    status, out, _ = call(f"ckpt={run}", "data.per_kind=1", "task.threshold_on=train+test", "out=again", entry="eval")
    assert status == 0 and "percentile 99 of the scores of train+test" in out
    again = list(csv.DictReader((tmp_path / "again" / "scores.csv").open()))
    assert sum(int(r["label"]) for r in again) < sum(int(r["label"]) for r in rows)


def test_a_series_of_ones_own_without_labels_gives_scores(call, tmp_path):
    values = np.random.default_rng(0).normal(size=(600, 2))
    np.save(tmp_path / "mine.npy", values)
    status, out, err = call("model=maat", "name=a", "data.path=mine.npy", *SMALL)
    assert (status, err) == (0, "") and "points reported" in out and "raw F1" not in out
    status, _, err = call("model=maat", "name=b", "data.path=mine.npy", "data.window=400", *SMALL[:4])
    assert status == 2 and "fewer than data.window = 400" in err and not (tmp_path / "runs/maat/b").exists()


def test_resumed_runs_have_the_same_losses(call, tmp_path):
    common = ["model=maat", "runs_dir=.", "task.stop_on=both", "task.baselines=false", *SMALL]
    assert call(*common, "name=whole")[0] == 0
    assert call(*common, "name=half", "trainer.max_steps=2")[0] == 0
    assert call("resume=maat/half", "trainer.max_steps=4")[0] == 0
    curves = [[(r["step"], r["train/loss"]) for r in csv.DictReader((tmp_path / f"maat/{n}/metrics.csv").open())
               if r["train/loss"]] for n in ("whole", "half")]  # fmt: skip
    assert len(curves[0]) == 4 and curves[0] == curves[1]


class TwoLosses(Task):
    """|w x|^2 and |w x - y|^2 of a linear model, in one loss or by name."""

    def __init__(self, by_name: bool, **more):
        super().__init__(nn.Linear(8, 1, bias=False), **more)
        nn.init.constant_(self.model.weight, 0.1)
        self.by_name, self.passes = by_name, 0
        self.model.weight.register_hook(self.count)

    def count(self, gradient):
        self.passes += 1

    def step(self, batch, training):
        y = self.model(batch["x"]).squeeze(-1)
        losses = {"a": y.square().mean(), "b": (y - batch["y"]).square().mean()}
        return StepOutput(sum(losses.values()), {}, len(y), losses=losses if self.by_name else None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=1e-2)


@pytest.mark.parametrize("accumulate, parts", [(1, 1), (2, 1), (1, 2)])
def test_named_losses_are_propagated_one_by_one_with_the_gradient_of_their_sum(accumulate, parts):
    import lightning as L

    weights = []
    for by_name in (False, True):
        task = TwoLosses(by_name)
        task.parts = parts
        trainer = L.Trainer(max_epochs=1, logger=False, accumulate_grad_batches=accumulate, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")  # fmt: skip
        trainer.fit(task, ToyData())
        weights.append(task.model.weight.detach())
        assert task.passes == 8 * (2 if by_name else 1)
    assert torch.allclose(*weights, atol=1e-7) and not torch.allclose(weights[0], torch.full((1, 8), 0.1))


def test_the_published_stopping_counts_validations_at_which_both_losses_fell():
    task = AnomalyDetection(nn.Identity(), stop_on="both")
    task._trainer = type("Fitting", (), {"state": type("S", (), {"fn": "fit"})})()
    seen = [task.derived({"loss1": a, "loss2": b})["improvements"] for a, b in ((3, 3), (2, 4), (2, 2), (1, 2), (1, 1))]
    assert seen == [1, 1, 2, 2, 3] and task.mode == "max" and task.monitor == "improvements"
    saved: dict = {}
    task.on_save_checkpoint(saved)
    other = AnomalyDetection(nn.Identity(), stop_on="both")
    other.on_load_checkpoint(saved)
    assert other._lowest == [1, 1] and other._improvements == 3
    task._trainer.state.fn = "validate"
    assert task.derived({"loss1": 0, "loss2": 0})["improvements"] == 3


def test_window_scores_are_laid_side_by_side_or_averaged():
    rows = np.arange(12.0).reshape(3, 4)
    assert spread(rows, [0, 4, 6], 10).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11]
    assert spread(rows, [0, 1, 2], 6).tolist() == [0, 2.5, 5, 6, 8.5, 11]


def spiky(seed=0):
    rng = np.random.default_rng(seed)
    train, test = (np.sin(np.arange(900) / 7)[:, None] + 0.05 * rng.normal(size=(900, 1)) for _ in range(2))
    labels = np.zeros(900, bool)
    for start in (300, 700):
        test[start : start + 5] += 4
        labels[start : start + 5] = True
    return train, test, labels


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_finds_what_nobody_could_miss(name):
    train, test, labels = spiky()
    scores = BASELINES[name](train, test, 50)
    assert [len(s) for s in scores] == [900, 900] and all(np.isfinite(s).all() for s in scores)
    found = find(*scores, labels, AnomalyDetection(nn.Identity()))
    assert found.measures.points.roc > 0.85 and found.measures.adjusted.recall == 1


def test_a_model_that_does_not_beat_the_baselines_says_so():
    labels = spiky()[2]
    settings = AnomalyDetection(nn.Identity(), vus_window=5)
    rng = np.random.default_rng(0)
    good, bad = (find(rng.random(900), rng.random(900) + factor * labels, labels, settings) for factor in (2, 0))
    assert "MAAT does not beat the best baseline, PCA" in verdict({"MAAT": bad, "PCA": good})["raw F1"]
    assert "MAAT beats the best baseline, PCA" in verdict({"MAAT": good, "PCA": bad})["VUS-PR"]
    assert len(table({"MAAT": bad, "PCA": good}).splitlines()) == 3


def test_settings_out_of_range_are_refused():
    for options, words in (
        ({"ratio": 0}, "task.ratio = 0"),
        ({"stop_on": "loss"}, "choose one of reconstruction, both"),
    ):
        with pytest.raises(ValueError, match=words):
            AnomalyDetection(MAAT(2, 8, 2, 1, 8), **options)
