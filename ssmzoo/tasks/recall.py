"""Recall: answers where something seen before is asked for, judged per length and number of pairs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.layers.state import state_bytes
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.metrics.recall import CaseTable, example_accuracy

IGNORE = -100


class Recall(Task):
    """Cross entropy in nats over the labelled positions, plus the model's auxiliary losses; accuracy is the mean over
    the examples of each one's share of right answers.

    The model maps ids (b l) to an output with logits (b l v); those of a vocabulary padded beyond the data's count as
    wrong. After training and in `eval.py` every test case of the data is measured: recall.csv and a heat map.

    read_twice   show what stands before the first question of a batch twice (JRT-Prompt); needs no training with it
    prefix       read what stands before the first question in both directions, with models that can
    """

    unit = "sequences"

    def __init__(self, model, optim=None, read_twice: bool = False, prefix: bool = False):
        super().__init__(model, optim)
        self.read_twice, self.prefix = read_twice, prefix

    def answers(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (b l v) at the positions of the labels (b l), and the model's auxiliary values."""
        if not (self.read_twice or self.prefix):
            out = self.model(ids)
            return out.logits, out.aux
        start = int((labels != IGNORE).any(0).int().argmax())
        if start == 0:
            raise ValueError(
                "task.read_twice and task.prefix need a context before the first question; this bench asks from the "
                "first token on"
            )
        lead = start if self.read_twice else 0
        out = self.model(torch.cat([ids[:, :lead], ids], dim=1), **({"prefix": lead + start} if self.prefix else {}))
        return out.logits[:, lead:], out.aux

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        labels = batch["labels"]  # (b l)
        logits, aux = self.answers(batch["input_ids"], labels)
        asked = labels != IGNORE
        count = asked.sum()
        chosen = logits[asked]  # (m v)
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        loss = F.cross_entropy(chosen, labels[asked], reduction="sum") / count.clamp(min=1)
        metrics = {"cross_entropy": loss.detach()}
        if self.measuring or not training:
            right = torch.zeros_like(asked)
            right[asked] = chosen.argmax(-1) == labels[asked]
            metrics["accuracy"] = example_accuracy(right, asked).mean()
        if not training:
            return StepOutput(loss, metrics, count)
        losses = [value for key, value in aux.items() if key.endswith("_loss")]
        return StepOutput(loss, metrics, count, sum(losses) if losses else None)

    def labelled(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    @torch.no_grad()
    def cases(self, data) -> CaseTable:
        """Accuracy of every test case."""
        was_training, table = self.model.training, CaseTable()
        self.model.eval()
        for batch in data.test_batches():
            labels = batch["labels"]
            right = self.answers(batch["input_ids"].to(self.device), labels)[0].argmax(-1).cpu() == labels
            table.add(batch["case"], example_accuracy(right, labels != IGNORE))
        self.model.train(was_training)
        return table

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        data = self.trainer.datamodule
        table = self.cases(data)
        held = self.state_bytes(data)
        table.write_csv(run_dir / "recall.csv", data.axes, {case: n for case, (_, n) in held.items()})
        trained = set(data.train_cases)
        rows = {
            "validation cross entropy": f"{validation['cross_entropy']:.5f} nats per answer",
            "validation accuracy": f"{100 * validation['accuracy']:.2f} % (trained sizes)",
        }
        beyond = [case for case in table.sums if case not in trained]
        if beyond:
            rows["accuracy beyond the trained sizes"] = (
                f"{100 * table.mean(beyond):.2f} % (mean of {len(beyond)} sizes)"
            )
        if held:
            short, long = min(held.values()), max(held.values())
            rows["state"] = f"{short[1]:,} bytes a sequence after {short[0]} tokens, {long[1]:,} after {long[0]}"
        figure = table.draw(run_dir / "recall.png", data.axes, trained, f"{type(self.model).__name__} on {data.bench}")
        return Report(rows, {f"{data.bench}, every test size": table.lines(data.axes, trained)}, [figure])

    def state_bytes(self, data) -> dict[tuple[int, int], tuple[int, int]]:
        """{test case: (length, bytes of state after it)}; empty for models whose mixers do not tell."""
        lengths = {case: data.example(case).shape[1] for case in data.test_cases}
        found = {case: (n, state_bytes(self.model, n)) for case, n in lengths.items()}
        return found if all(held for _, held in found.values()) else {}
