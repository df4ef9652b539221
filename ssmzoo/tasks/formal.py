"""Regular languages: the answer after every prefix or after the whole string, judged at every length up to far beyond
the trained one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.learnt_states import LearntStates
from ssmzoo.tasks.metrics.formal import LengthCurve, StreamCurve, draw_lengths

IGNORE = -100


def consistency(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Variance of the logits within a class over their whole variance; 0 when equal answers have equal logits.

    logits (m c), labels (m), of which those that are IGNORE do not count. Cross entropy fades once every answer is
    right; this does not, so that a recurrence keeps being pulled towards one that neither drifts nor decays.
    """
    with torch.no_grad():  # means are where the squares are least: that they move adds nothing to the gradient
        member = (labels[:, None] == torch.arange(num_classes, device=labels.device)).to(logits.dtype)  # (m classes)
        counted, sizes = member.sum(-1, keepdim=True), member.sum(0)  # 1, or 0 where ignored
        means = member.mT @ logits / sizes.clamp(min=1)[:, None]
        mean = sizes @ means / sizes.sum().clamp(min=1)
        centre, centres = counted * mean, member @ means
    logits = counted * logits
    within = F.mse_loss(logits, centres, reduction="sum")
    total = F.mse_loss(logits, centre, reduction="sum")
    return within / total.clamp(min=1e-12)


class FormalLanguage(Task):
    """Classify strings with any sequence model of the zoo.

    num_classes   classes of the language; a model with more outputs (a language model) is read at its first ones
    consistency   weight of the term of the same name above; 0: plain cross entropy, as published
    long_rows, long_length   `eval.py` follows so many strings of so many symbols with carried state; 0: none
    long_chunk    symbols per call there
    long_snap     there, besides: follow them once more, every so many symbols going on from the nearest learnt state
                  (`tasks/learnt_states.py`), which takes away what a real-valued state drifts; 0: not

    Loss: cross entropy in nats over the labelled positions, plus consistency, plus the model's auxiliary losses. The
    best checkpoint has the lowest loss on validation strings, where drift shows in the consistency long before an
    answer is wrong.
    """

    unit = "strings"

    def __init__(
        self,
        model: nn.Module,
        optim: Callable[[nn.Module], Any] | None = None,
        num_classes: int = 2,
        consistency: float = 0.0,
        long_rows: int = 16,
        long_length: int = 100_000,
        long_chunk: int = 1000,
        long_snap: int = 0,
    ):
        super().__init__(model, optim)
        if num_classes < 2 or consistency < 0 or long_rows < 1 or long_length < 0 or long_chunk < 1:
            raise ValueError(
                f"task: num_classes = {num_classes} must be at least 2, consistency = {consistency} and "
                f"long_length = {long_length} not negative, long_rows and long_chunk at least 1"
            )
        self.num_classes, self.consistency = num_classes, consistency
        self.long_rows, self.long_length, self.long_chunk = long_rows, long_length, long_chunk
        if long_snap < 0:
            raise ValueError(
                f"task.long_snap = {long_snap} must not be negative: symbols between two corrections, or 0"
            )
        self.long_snap = long_snap
        self._takes_mask = "mask" in inspect.signature(model.forward).parameters

    def on_fit_start(self) -> None:
        size, needed = getattr(self.model, "state_size", None), self.trainer.datamodule.sizes["num_states"]
        if size is not None and size < needed:
            warnings.warn(
                f"model.state_size = {size} is below the {needed} states of the automaton "
                f"{self.trainer.datamodule.language.name}; it may still fit, but need not",
                stacklevel=2,
            )

    def logits(self, batch: dict[str, Tensor], state=None):
        """(logits (b l c), state, auxiliary values)."""
        extra = {"mask": batch["mask"]} if batch.get("mask") is not None and self._takes_mask else {}
        out = self.model(batch["input_ids"], state, **extra)
        return out.logits[..., : self.num_classes], out.state, out.aux

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        logits, _, aux = self.logits(batch)
        labels = batch["labels"]  # (b l)
        asked = labels != IGNORE
        count = asked.sum()
        if labels.is_cpu and int(count) < labels.numel():  # a GPU would have to be waited for
            chosen, labels = logits[asked], labels[asked]  # (m c), (m)
        else:
            chosen, labels = logits.flatten(0, 1), labels.flatten()
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        lanes = chosen.mT[None], labels[None]  # along the last axis torch's vectors run: over m, not over few classes
        cross_entropy = F.cross_entropy(*lanes, ignore_index=IGNORE, reduction="sum") / count.clamp(min=1)
        loss, metrics = cross_entropy, {"cross_entropy": cross_entropy.detach()}
        if self.measuring or not training:
            metrics["accuracy"] = (chosen.argmax(-1) == labels).double().sum() / count
        if self.consistency and len(labels):
            spread = consistency(chosen, labels, self.num_classes)
            loss, metrics["spread"] = loss + self.consistency * spread, spread.detach()
        if not training:
            return StepOutput(loss, metrics, count)
        losses = [v for k, v in aux.items() if k.endswith("_loss")]
        return StepOutput(loss, metrics, count, sum(losses) if losses else None)

    def labelled(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"] != IGNORE).sum()

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        data = self.trainer.datamodule
        rows = {
            "validation cross entropy": f"{validation['cross_entropy']:.6f} nats per answer",
            "validation accuracy": f"{100 * validation['accuracy']:.3f} % over all prefixes",
        }
        if not hasattr(data, "test_sets"):  # protocols B and C: validation is their test
            return Report(rows, {}, [])
        curve = self.length_curve(data)
        curve.write_csv(run_dir / "lengths.csv")
        figure = draw_lengths(
            run_dir / "lengths.png",
            {type(self.model).__name__: curve},
            data.max_length,
            f"{data.language.name}: {data.language.num_states} states",
        )
        return Report(rows | curve.rows(data.max_length), {}, [figure])

    @torch.no_grad()
    def length_curve(self, data) -> LengthCurve:
        """Accuracy at every length 1 .. data.test_length on strings that training has not used."""
        was_training = self.model.training
        self.model.eval()
        curve = LengthCurve(data.test_length)
        for strings in data.test_sets():
            ids, labels = torch.from_numpy(strings.ids.copy()).to(self.device), torch.from_numpy(strings.labels.copy())
            right = (self.logits({"input_ids": ids})[0].argmax(-1).cpu() == labels) & (labels != IGNORE)
            curve.add(right.numpy(), (labels != IGNORE).numpy(), strings.hashes, query=data.query_token)
        self.model.train(was_training)
        return curve

    @torch.no_grad()
    def stream_curve(self, data, snap: int = 0) -> StreamCurve | None:
        """Accuracy along strings of `long_length` symbols in constant memory; None for models without a state.

        snap   symbols after which the state is replaced by the nearest learnt one; 0: never
        """
        self.model.eval()
        curve, state, learnt = StreamCurve(), None, None
        for ids, labels in data.stream(self.long_rows, self.long_length, self.long_chunk):
            logits = []
            for part in ids.to(self.device).split(snap or ids.shape[1], dim=1):
                out, state, _ = self.logits({"input_ids": part}, state)
                if state is None:
                    return None
                logits.append(out)
                if snap:
                    learnt = learnt or self.learnt_states(data)
                    state = learnt.nearest(state)
            asked = labels != IGNORE
            curve.add(((torch.cat(logits, dim=1).argmax(-1).cpu() == labels) & asked).numpy(), asked.numpy())
        return curve

    def learnt_states(self, data, rows: int = 4096) -> LearntStates:
        """After so many strings like the longest of training, or up to three symbols shorter: many automata are in some
        states after an even number of symbols only."""
        ids = data.longest(rows).to(self.device)
        lengths = range(max(1, ids.shape[1] - 3), ids.shape[1] + 1)
        return LearntStates(
            *(self.logits({"input_ids": part[:, :n]})[1] for n, part in zip(lengths, ids.chunk(len(lengths))))
        )

    def evaluate(self, out: Path, data) -> Report:
        """What `eval.py` adds to `report`: strings of `long_length` symbols."""
        if self.long_length == 0 or not hasattr(data, "stream") or data.query_token:
            return Report({}, {}, [])
        curve = self.stream_curve(data)
        if curve is None:
            return Report({"long strings": f"{type(self.model).__name__} carries no state"}, {}, [])
        curve.write_csv(out / "long.csv")
        rows = curve.rows()
        if self.long_snap:
            snapped = self.stream_curve(data, self.long_snap)
            snapped.write_csv(out / "long_snapped.csv")
            rows |= {f"{key}, learnt states": value for key, value in snapped.rows().items()}
        return Report(rows, {}, [])
