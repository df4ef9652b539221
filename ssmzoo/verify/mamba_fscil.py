"""Mamba-FSCIL's neck, and the training step of its classifier (losses and logits on feature maps)."""

from __future__ import annotations

from torch import Tensor, nn

from ssmzoo.models.mamba_fscil import ETFHead, MambaNeck
from ssmzoo.released import mamba_fscil
from ssmzoo.tasks.objectives.fscil import dot_regression, incremental_losses


def official(state: dict[str, Tensor], **official_kwargs):
    """MambaNeck, or the classifier's training step on feature maps if `neck` and `head` are given."""
    if "neck" not in official_kwargs:
        return mamba_fscil.official(state, **official_kwargs)
    arguments, weights = mamba_fscil.neck_arguments(**official_kwargs["neck"])
    head, loss = official_kwargs["head"], official_kwargs.get("loss", {})
    if official_kwargs.get("mixup", 0.0):
        raise ValueError("mixup draws random partners; the step without it (mixup=0.0) can be reproduced")
    step = TrainingStep(
        MambaNeck(**arguments),
        ETFHead(head["in_channels"], head["num_classes"]),
        head["eval_classes"],
        head.get("with_len", False),
        loss.get("loss_weight", 1.0),
        weights,
    )
    return step, state


class TrainingStep(nn.Module):
    """The released `forward_train` on feature maps: losses, then logits of the classes seen so far."""

    def __init__(self, neck: MambaNeck, head: ETFHead, seen: int, with_len: bool, loss_weight: float, weights: dict):
        super().__init__()
        self.neck, self.head = neck, head
        self.seen, self.with_len, self.loss_weight, self.weights = seen, with_len, loss_weight, weights

    def forward(self, x: Tensor, gt_label: Tensor) -> tuple[Tensor, ...]:
        out = self.neck(x)
        loss = dot_regression(out.features, gt_label, self.head.etf_vec, self.loss_weight, self.with_len)
        terms = incremental_losses(out, gt_label, self.seen, **self.weights)
        return loss, *terms.values(), self.head(out.features, self.seen)
