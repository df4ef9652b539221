"""Few-shot class-incremental learning: train on base classes, then learn new ones from a few images each.

The base session is a normal training run of backbone and neck. When it is over, every image goes through the frozen
backbone once, the neck gets its second branch, and session after session is trained on stored feature maps:

    the few maps of the new classes
    + the mean map of every earlier new class x copy + those of the base classes x base_copy

After every session the model is tested on all classes seen so far, in one joint label space.
Source: Li et al. 2024 (arXiv 2407.06136); the defaults are its CIFAR-100 settings.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.classification import mixing
from ssmzoo.tasks.objectives.fscil import dot_regression, incremental_losses


class FewShotIncremental(Task):
    """The whole protocol; `val/top1` is that of the base classes.

    lr, steps            of every incremental session (SGD, momentum 0.9, weight decay 5e-4, cosine to 1 %)
    copy, base_copy      how often the mean maps are repeated in a session's data
    (steps and base_copy may be lists: a number for every session, the last one for all further ones)
    weight_supp, weight_supp_novel, weight_sep, weight_sep_new   the class-sensitive losses
    mix_prob             chance of mixing features half and half with those of other images
    old_lr               learning rate of the base branch relative to the new one's
    with_len_base, with_len   scale targets by class frequency, in the base session and afterwards
    detach_residual      no gradient into the base branch
    dual_branch          False: no second branch; the sessions train the base branch on, at `lr` (an ablation)
    base_mixup, base_cutmix   alpha of either in the base session (0: off);  base_mix_prob  how often a batch is mixed
    base_plain_again     with mixing: add the loss of the unmixed labels once more, as the released code does
    """

    unit, monitor, mode = "images", "top1", "max"

    def __init__(
        self,
        model,
        optim=None,
        lr: float = 0.25,
        steps: int | list[int] = 200,
        batch_size: int = 64,
        copy: int = 1,
        base_copy: int | list[int] = 1,
        weight_supp: float = 100.0,
        weight_supp_novel: float = 1e-5,
        weight_sep: float = 0.0,
        weight_sep_new: float = 0.001,
        mix_prob: float = 0.75,
        old_lr: float = 0.0,
        with_len_base: bool = False,
        with_len: bool = True,
        detach_residual: bool = True,
        dual_branch: bool = True,
        base_mixup: float = 0.0,
        base_cutmix: float = 0.0,
        base_mix_prob: float = 0.8,
        base_plain_again: bool = False,
    ):
        super().__init__(model, optim)
        if not hasattr(model, "neck"):
            raise ValueError(
                f"task=fscil needs model=mamba_fscil (a neck and fixed class directions), not {type(model).__name__}"
            )
        steps, base_copy = ([v] if isinstance(v, int) else list(v) for v in (steps, base_copy))
        if lr <= 0 or min(steps, default=0) < 1 or min(base_copy, default=-1) < 0:
            raise ValueError(
                f"task.lr = {lr} and task.steps = {steps} must be positive, task.base_copy = {base_copy} not negative"
            )
        for name, value in (("mix_prob", mix_prob), ("base_mix_prob", base_mix_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"task.{name} = {value}; it must lie between 0 and 1")
        self.lr, self.steps, self.batch_size, self.copy, self.base_copy = lr, steps, batch_size, copy, base_copy
        self.weights = dict(
            weight_supp=weight_supp,
            weight_supp_novel=weight_supp_novel,
            weight_sep=weight_sep,
            weight_sep_new=weight_sep_new,
        )
        self.mix_prob, self.old_lr, self.with_len_base, self.with_len = mix_prob, old_lr, with_len_base, with_len
        self.detach_residual, self.dual_branch = detach_residual, dual_branch
        if not dual_branch:
            self.weights["weight_sep_new"] = 0.0  # there are no new scan parameters
        if model.neck_args["version"] == "mlp" and weight_sep + self.weights["weight_sep_new"] > 0:
            raise ValueError(
                "a neck without a scan (model.version=mlp) has no parameters to be set apart: give task.weight_sep=0 "
                "task.weight_sep_new=0"
            )
        self.mix = mixing(base_mixup, base_cutmix, base_mix_prob, 0.5, 0.0, model.num_classes)
        self.base_plain_again = base_plain_again

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if not hasattr(data, "base_classes"):
            raise ValueError(
                f"task=fscil needs data in sessions, such as data=digits_fewshot, cifar100_fewshot or "
                f"image_folder_fewshot, not {type(data).__name__}"
            )

    def step(self, batch, training: bool) -> StepOutput:
        (images, labels), model = (batch["image"], batch["label"]), self.model
        mixed = training and self.mix is not None and len(images) % 2 == 0
        images, targets = self.mix(images, labels) if mixed else (images, labels)
        features = model.neck(model.feature_map(images)).features
        with_len = self.with_len_base and training
        loss = dot_regression(features, targets, model.head.etf_vec, with_len=with_len)
        if mixed and self.base_plain_again:
            loss = loss + dot_regression(features, labels, model.head.etf_vec, with_len=with_len)
        hits = model.head(features, self.trainer.datamodule.base_classes).argmax(-1) == labels
        return StepOutput(loss, {"top1": hits.float().mean()}, len(labels))

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        from safetensors.torch import save_file

        data = self.trainer.datamodule
        with torch.random.fork_rng():
            torch.manual_seed(data.seed)
            scores, means = self.sessions(data)
        save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, run_dir / "sessions.safetensors")
        rows = {
            "top-1 per session": " ".join(f"{100 * s:.2f}" for s in scores),
            "average top-1": f"{100 * sum(scores) / len(scores):.2f} %",
            "performance drop": f"{100 * (scores[0] - scores[-1]):.2f} points",
            "nearest class mean on the backbone, per session": " ".join(f"{100 * s:.2f}" for s in means),
        }
        lines = [f"{i},{data.seen(i)},{a:.4f},{b:.4f}" for i, (a, b) in enumerate(zip(scores, means))]
        (run_dir / "sessions.csv").write_text("\n".join(["session,classes,top1,nearest_mean_top1", *lines]) + "\n")
        return Report(rows, {}, [])

    @torch.no_grad()
    def maps(self, data, which: str) -> tuple[Tensor, Tensor]:
        """Feature maps (n d y x) and labels (n) of a set of images, by the frozen backbone."""
        batches = [(self.model.feature_map(x.to(self.device)), y.to(self.device)) for x, y in data.images(which)]
        return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])

    def sessions(self, data) -> tuple[list[float], list[float]]:
        """(top-1 of our model, of nearest class means on pooled maps) after the base and every further session."""
        model = self.model.eval()
        base, test = self.maps(data, "base"), self.maps(data, "test")
        few = self.maps(data, "few")
        means = torch.stack([base[0][base[1] == c].mean(0) for c in range(data.base_classes)])
        scores, nearest = [self.score(test, data.seen(0))], [nearest_mean(means, test)]
        if self.dual_branch:
            model.add_branch(self.detach_residual)
        for session in range(1, data.sessions + 1):
            old, new = data.seen(session - 1), data.seen(session)
            chosen = (few[1] >= old) & (few[1] < new)
            x, y = self.memory(data, means, few[0][chosen], few[1][chosen], of_session(self.base_copy, session))
            self.learn(x, y, data.base_classes, of_session(self.steps, session))
            means = torch.cat([means, torch.stack([few[0][few[1] == c].mean(0) for c in range(old, new)])])
            scores.append(self.score(test, new))
            nearest.append(nearest_mean(means, test))
        return scores, nearest

    def memory(self, data, means: Tensor, maps: Tensor, labels: Tensor, base_copy: int) -> tuple[Tensor, Tensor]:
        """What a session trains on: new maps, and the means of everything learnt before."""
        known = torch.arange(len(means), device=maps.device)
        times = torch.where(known < data.base_classes, base_copy, self.copy)
        return (
            torch.cat([maps, means.repeat_interleave(times, dim=0)]),
            torch.cat([labels, known.repeat_interleave(times)]),
        )

    def learn(self, x: Tensor, y: Tensor, base: int, steps: int) -> None:
        """One session: `steps` updates of the neck on stored maps x (n d y x) with labels y."""
        neck = self.model.neck.train()
        new = [p for n, p in neck.named_parameters() if "_new" in n or not self.dual_branch]
        old = [p for n, p in neck.named_parameters() if "_new" not in n and self.dual_branch]
        groups = [{"params": new, "lr": self.lr}, {"params": old, "lr": self.lr * self.old_lr}]
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: session_rate(s, steps))
        for p in old:
            p.requires_grad_(self.old_lr > 0)
        for _ in range(steps):
            chosen = torch.randperm(len(x))[: self.batch_size].to(x.device)
            optimizer.zero_grad()
            with torch.enable_grad():
                self.session_loss(x[chosen], y[chosen], base).backward()
            optimizer.step()
            scheduler.step()
        neck.eval()

    def session_loss(self, x: Tensor, y: Tensor, base: int) -> Tensor:
        """Dot regression, half of it on a partner's label where features are mixed, and the class-sensitive terms."""
        out = self.model.neck(x)
        directions, features = self.model.head.etf_vec, out.features
        if float(torch.rand(())) < self.mix_prob:
            partner = torch.randperm(len(x)).to(x.device)
            features = 0.5 * (features + features[partner])
            loss = 0.5 * sum(
                dot_regression(features, labels, directions, with_len=self.with_len) for labels in (y, y[partner])
            )
        else:
            loss = dot_regression(features, y, directions, with_len=self.with_len)
        return loss + sum(incremental_losses(out, y, base, **self.weights).values())

    @torch.no_grad()
    def score(self, test: tuple[Tensor, Tensor], seen: int) -> float:
        """Top-1 over the test images of the first `seen` classes."""
        maps, labels = (t[test[1] < seen] for t in test)
        hits = [
            self.model.head(self.model.neck(m).features, seen).argmax(-1) == y
            for m, y in zip(maps.split(256), labels.split(256))
        ]
        return torch.cat(hits).float().mean().item()


def of_session(values: list[int], session: int) -> int:
    """The value of a session (from 1)."""
    return values[min(session, len(values)) - 1]


def session_rate(step: int, steps: int) -> float:
    """Warm-up over 5 steps from a tenth, cosine to 1 %, the last 5 steps at a tenth of that."""
    if step >= steps - 5:
        return 0.001
    warm = min(1.0, 0.1 + 0.9 * step / 5)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def nearest_mean(means: Tensor, test: tuple[Tensor, Tensor]) -> float:
    """Top-1 of the class with the nearest mean (by cosine) of pooled maps; means (k d y x)."""
    maps, labels = (t[test[1] < len(means)] for t in test)
    centres, features = (torch.nn.functional.normalize(m.mean((2, 3)), dim=-1) for m in (means, maps))
    return ((features @ centres.T).argmax(-1) == labels).float().mean().item()
