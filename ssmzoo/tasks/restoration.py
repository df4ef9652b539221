"""Image restoration: a pixel loss in training, the papers' PSNR and SSIM in validation, results per picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssmzoo.inference.tiling import PUBLISHED_TILE, run_padded, run_published, self_ensemble
from ssmzoo.suggest import nearest
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.metrics.image import psnr, ssim, ssim_volume
from ssmzoo.tasks.objectives.pixel import LOSSES
from ssmzoo.tasks.restoration_baselines import BASELINES

SHOWN = 4  # pictures in the side-by-side figure


class Shown(NamedTuple):
    """What the figure needs of one picture, 8-bit levels (c y x)."""

    name: str
    degraded: Tensor
    restored: Tensor
    truth: Tensor


def to_levels(image: Tensor) -> Tensor:
    """(c y x) in [0, 1] to 8-bit levels: clamp, times 255, round half to even."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def mixed(lq: Tensor, gt: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Both (b c y x) blended with the batch in another order, by one weight from Beta(strength, strength), or not."""
    if strength == 0 or torch.rand(()) < 0.5:
        return lq, gt
    weight = torch.distributions.Beta(strength, strength).sample().item()
    order = torch.randperm(len(lq), device=lq.device)
    return tuple(weight * t + (1 - weight) * t[order] for t in (lq, gt))


class Restoration(Task):
    """Train on pairs {"lq", "gt"} in [0, 1] and measure on 8-bit levels, one picture at a time.

    loss          l1 or charbonnier
    crop_border   pixels left out on every side when measuring; None: the model's scale for super-resolution, else 0
    y_channel     measure on luma (super-resolution, JPEG) rather than RGB
    rounded       measure on 8-bit levels; False: on what the network gives, and SSIM over the channels as one volume,
                  as MATLAB does for real noise (SIDD)
    mixup         mix pairs of a batch with weights from Beta(mixup, mixup), in every second step on average; 0: never
    baseline      what results are compared with: bicubic, nl_means (needs sigma), or none (the degraded picture)
    sigma         noise level given to nl_means, in 8-bit levels
    tile          validate in the published protocol's tiles of about so many pixels; None: whole pictures
    self_ensemble average over the 8 flips and transposes ("+" in the papers' tables) in validation
    lpips         also measure LPIPS (AlexNet) by torchmetrics, which fetches weights once
    """

    unit = "patches"
    monitor, mode = "psnr", "max"

    def __init__(
        self,
        model,
        optim=None,
        loss: str = "l1",
        crop_border: int | None = None,
        y_channel: bool = True,
        rounded: bool = True,
        mixup: float = 0.0,
        baseline: str = "bicubic",
        sigma: float | list[float] | None = None,
        tile: int | None = PUBLISHED_TILE,
        self_ensemble: bool = False,
        lpips: bool = False,
    ):
        super().__init__(model, optim)
        for name, value, known in (("loss", loss, LOSSES), ("baseline", baseline, BASELINES)):
            if value not in known:
                choices = ", ".join(known)
                raise ValueError(f"task.{name} = '{value}'{nearest(str(value), known)}; choose one of {choices}")
        if mixup < 0:
            raise ValueError(f"task.mixup = {mixup}; it must be 0 (off) or positive, e.g. 1.2")
        if baseline == "nl_means" and sigma is None:
            raise ValueError("task.baseline=nl_means needs task.sigma, the noise level in 8-bit levels")
        scale = model.upscale
        self.loss, self.scale = LOSSES[loss], scale
        self.crop_border = (scale if scale > 1 else 0) if crop_border is None else crop_border
        self.y_channel, self.baseline, self.tile = y_channel, baseline, tile
        self.rounded, self.mixup = rounded, mixup
        self.sigma = sigma[0] if isinstance(sigma, (list, tuple)) else sigma
        self.self_ensemble = self_ensemble
        self.lpips = _load_lpips() if lpips else None
        self._rows: list[dict] = []
        self._shown: list[Shown] = []

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if data is not None and data.sizes["upscale"] != self.scale:
            raise ValueError(
                f"the model enlarges by {self.scale} and the data by {data.sizes['upscale']}; "
                f"set model.upscale or data.scale so that they agree"
            )

    def step(self, batch, training: bool) -> StepOutput:
        if training:
            lq, gt = mixed(batch["lq"], batch["gt"], self.mixup)
            return StepOutput(self.loss(self.model(lq), gt), {}, len(lq))
        restored = self.restore(batch["lq"])
        got, truth = to_levels(restored[0]), to_levels(batch["gt"][0])
        try:
            row = self.measure(restored[0], batch["gt"][0])
        except ValueError as error:
            raise ValueError(f"{batch['name'][0]} cannot be measured: {error}; leave it out of the folder") from None
        if self.lpips is not None:
            row["lpips"] = float(self.lpips(got[None].float() / 255, truth[None].float() / 255))
        self._rows.append({"name": batch["name"][0]} | row)
        if len(self._shown) < SHOWN:
            self._shown.append(Shown(batch["name"][0], to_levels(batch["lq"][0]).cpu(), got.cpu(), truth.cpu()))
        metrics = {k: torch.tensor(v, dtype=torch.float64) for k, v in row.items()}
        return StepOutput(self.loss(restored, batch["gt"]), metrics, 1)

    def measure(self, restored: Tensor, truth: Tensor) -> dict[str, float]:
        """PSNR and SSIM of (c y x) in [0, 1] by the protocol."""
        if self.rounded:
            pair, similarity = (to_levels(restored), to_levels(truth)), ssim
        else:
            pair, similarity = (restored.clamp(0, 1) * 255, truth * 255), ssim_volume
        return {
            "psnr": psnr(*pair, self.crop_border, self.y_channel),
            "ssim": similarity(*pair, self.crop_border, self.y_channel),
        }

    def restore(self, lq: Tensor) -> Tensor:
        """(b c y x) to (b c s*y s*x) by the evaluation protocol: padding, tiles, self-ensemble."""

        def padded(x: Tensor) -> Tensor:
            return run_padded(self.model, x, self.scale, self.model.size_multiple)

        def tiled(x: Tensor) -> Tensor:
            return padded(x) if self.tile is None else run_published(padded, x, self.scale, self.tile)

        return self_ensemble(tiled, lq) if self.self_ensemble else tiled(lq)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._rows, self._shown = [], []

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        self._add_baseline(self.trainer.datamodule if self.trainer is not None else None)
        mean = {k: sum(r[k] for r in self._rows) / max(1, len(self._rows)) for k in self._rows[0] if k != "name"}
        with open(run_dir / "per_image.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, self._rows[0].keys())
            writer.writeheader()
            writer.writerows({k: v if k == "name" else f"{v:.6f}" for k, v in r.items()} for r in self._rows)
        channel = "Y-PSNR" if self.y_channel and self.model.in_chans == 3 else "PSNR"
        against = "degraded picture" if self.baseline == "none" else self.baseline.replace("_", "-")
        rows = {
            f"{channel}, mean over {len(self._rows)} held-out pictures": f"{mean['psnr']:.3f} dB",
            f"{channel} of the {against}"
            if self.baseline == "none"
            else f"{channel} of {against}": f"{mean['baseline_psnr']:.3f} dB",
            "gain": f"{mean['psnr'] - mean['baseline_psnr']:+.3f} dB",
            "SSIM": f"{mean['ssim']:.4f} ({against}: {mean['baseline_ssim']:.4f})",
        }
        rows |= {"LPIPS": f"{mean['lpips']:.4f}"} if "lpips" in mean else {}
        table = [f"{'picture':<24}{channel:>9}{'baseline':>10}{'gain':>8}{'SSIM':>8}"]
        table += [
            f"{r['name'][:23]:<24}{r['psnr']:>9.3f}{r['baseline_psnr']:>10.3f}"
            f"{r['psnr'] - r['baseline_psnr']:>+8.3f}{r['ssim']:>8.4f}"
            for r in self._rows[:100]
        ]
        from ssmzoo.tasks.restoration_figure import draw_comparison

        figure = draw_comparison(self._shown, run_dir / "comparison.png")
        return Report(rows, {f"per picture (dB; baseline: {against})": "\n".join(table)}, [figure])

    def _add_baseline(self, data) -> None:
        """PSNR and SSIM of the baseline for every picture of the last validation."""
        by_name = {r["name"]: r for r in self._rows}
        for batch in data.val_dataloader():
            row = by_name.get(batch["name"][0])
            if row is None:  # limit_val_batches
                continue
            got = BASELINES[self.baseline](batch["lq"][0], self.scale, self.sigma)
            row |= {f"baseline_{k}": v for k, v in self.measure(got, batch["gt"][0]).items()}

    def evaluate(self, out: Path, data) -> Report:
        """Nothing beyond the report: per_image.csv and comparison.png are the evaluation."""
        return Report({"pictures": str(len(self._rows)), "per picture": str(out / "per_image.csv")}, {}, [])


def _load_lpips():
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except Exception as error:  # torchvision missing, no network for its weights, ...
        raise ValueError(
            f"task.lpips=true needs torchmetrics, torchvision and, once, a network for AlexNet's weights: "
            f"{type(error).__name__}: {error}"
        ) from None
