"""Gradients added up over micro-batches, and over ranks, are those of one large batch: in float64, to rounding."""

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset

from ssmzoo.data.loader import ResumableLoader
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.moe_mamba import MoEMambaLM
from ssmzoo.ops import backend
from ssmzoo.tasks.accumulation import update_is_complete
from ssmzoo.tasks.formal import FormalLanguage
from ssmzoo.tasks.language import IGNORE, LanguageModeling

ROWS, LENGTH = 22, 9  # 22 rows in micro-batches of 4: the last window of an epoch is short


class Ragged(Dataset):
    """Rows whose numbers of labels differ widely, one of them without any."""

    def __len__(self):
        return ROWS

    def __getitem__(self, draw):
        g = torch.Generator().manual_seed(draw.index)
        ids = torch.randint(0, 13, (LENGTH + 1,), generator=g)
        labels = ids[1:].clone()
        labels[: draw.index % (LENGTH + 1)] = IGNORE
        return {"input_ids": ids[:-1], "labels": labels}


def model(kind: str):
    torch.manual_seed(0)
    if kind == "mamba":
        return MambaLM(vocab_size=13, d_model=8, n_layer=1).double()
    capacity, top_k = {"moe": (None, 2), "moe_capacity": (1.0, 1)}[kind]
    return MoEMambaLM(
        vocab_size=13,
        d_model=8,
        n_blocks=2,
        n_experts=4,
        top_k=top_k,
        capacity_factor=capacity,
        balance_weight=0.5,
        z_loss_weight=0.1,
    ).double()


def train(task, batch_size: int, parts: int, folder):
    """Two epochs; (weights after it, losses of the updates)."""
    losses = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if update_is_complete(trainer):
                losses.append(float(task.trained_loss))

    loader = ResumableLoader(Ragged(), batch_size, shuffle=True, seed=3)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(
        max_epochs=2,
        accumulate_grad_batches=parts,
        accelerator="cpu",
        callbacks=[Keep()],
        default_root_dir=folder,
        **quiet,
    )
    with backend("reference"):  # in float64 throughout
        trainer.fit(task, loader)
    return {k: v.clone() for k, v in task.model.state_dict().items()}, losses


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", ["mamba", "moe", "moe_capacity"])
def test_micro_batches_equal_the_large_batch(kind, tmp_path):
    whole, losses = train(LanguageModeling(model(kind), sgd), 12, 1, tmp_path)
    parts, again = train(LanguageModeling(model(kind), sgd), 4, 3, tmp_path)
    assert len(losses) == len(again) == 4  # updates: 12 and 10 rows, twice
    assert again == pytest.approx(losses, rel=1e-12)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)
    plain, _ = train(LanguageModeling(model(kind), sgd), 12, 1, tmp_path)
    assert all(torch.equal(plain[k], whole[k]) for k in whole)


def test_answers_of_strings_are_weighted_too(tmp_path, monkeypatch):
    monkeypatch.setattr(FormalLanguage, "on_fit_start", lambda self: None)  # it asks the data for the automaton
    whole, losses = train(FormalLanguage(model("mamba"), sgd, num_classes=13), 12, 1, tmp_path)
    parts, again = train(FormalLanguage(model("mamba"), sgd, num_classes=13), 4, 3, tmp_path)
    assert again == pytest.approx(losses, rel=1e-12)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)


def test_samples_are_weighted_where_no_item_has_a_label(tmp_path):
    """Micro-batches of a task that counts samples: 3 of 4 are one of 12, in the short last update of an epoch too."""
    from toy import Regression, ToyData

    def go(batch_size: int, parts: int) -> list[float]:
        torch.manual_seed(0)
        task, losses = Regression(torch.nn.Linear(8, 1)), []

        class Keep(L.Callback):
            def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
                if update_is_complete(trainer):
                    losses.append(float(task.trained_loss))

        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer = L.Trainer(
            max_epochs=2,
            accumulate_grad_batches=parts,
            accelerator="cpu",
            limit_val_batches=0,
            callbacks=[Keep()],
            default_root_dir=tmp_path,
            **quiet,
        )
        trainer.fit(task, datamodule=ToyData(batch_size=batch_size))
        return losses

    assert go(4, 3) == pytest.approx(go(12, 1), rel=1e-5)
