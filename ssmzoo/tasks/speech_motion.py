"""Stage 2 of MambaTalk: from speech, words, speaker and four frames of motion to codes, and from codes to motion."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.metrics import motion as metrics
from ssmzoo.tasks.motion import codes_training_step, endless, many
from ssmzoo.tasks.objectives.motion import random_mask, seed_mask, speech_loss

SEEDS = 4  # frames of motion that are given
BODY = ("upper", "hands", "lower")
PARTS = ("face", *BODY)


class SpeechMotion(Task):
    """Train a model that names what it says in `model.codes`.

    codes_steps   train the code books for so many steps first, unless init_from brought trained ones; 0: refuse then
    codes_lr      learning rate of that, which falls to a tenth; two fifths of the steps are without code books

    A step is three passes, whose losses add up: all motion hidden but four frames; a growing share of its values
    hidden, twice. Validation hides all but four frames. The report speaks whole clips, window after window, and judges
    them.
    """

    unit = "windows"

    def __init__(
        self,
        model: nn.Module,
        optim: Callable[[nn.Module], Any] | None = None,
        codes_steps: int = 150,
        codes_lr: float = 2e-3,
    ):
        super().__init__(model, optim)
        if codes_steps < 0 or codes_lr <= 0:
            raise ValueError(
                f"task.codes_steps = {codes_steps} must not be negative, task.codes_lr = {codes_lr} positive"
            )
        self.codes_steps, self.codes_lr = codes_steps, codes_lr

    def check_data(self, data) -> None:
        if not self.model.codes.trained and not self.codes_steps:
            raise ValueError(
                "the code books are not trained: give init_from=runs/motion_codes/NAME (python train.py "
                "model=motion_codes makes one), or task.codes_steps above 0"
            )

    def on_fit_start(self) -> None:
        """The first stage, where no run of it was given and none is in a checkpoint."""
        codes, data = self.model.codes, self.trainer.datamodule
        self.model.talk.start_at(many(data, ["whole"], self.device)["whole"])
        if codes.trained or not self.codes_steps:
            return
        print(f"stage 1: {self.codes_steps} steps of the code books (or give init_from)", flush=True)
        codes.requires_grad_(True).train()
        optimizer = torch.optim.Adam(codes.parameters(), lr=self.codes_lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, self.codes_steps)
        for batch in islice(endless(data), self.codes_steps):
            batch = {k: v.to(self.device) for k, v in batch.items()}
            loss, _ = codes_training_step(codes, batch, data, 2 * self.codes_steps // 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        codes.requires_grad_(False).eval()
        print(f"stage 1: loss {float(loss.detach()):.4f}", flush=True)

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        with torch.no_grad():
            said = self.model.codes(batch)
        latent, code = ({part: getattr(said[part], kind) for part in PARTS} for kind in ("latent", "code"))
        talk, whole = self.model.talk, batch["whole"]
        masks, face_weights = [seed_mask(whole, SEEDS)], [0.0]
        if training:
            share = 0.05 + 0.95 * self.trainer.global_step / max(1, self.trainer.estimated_stepping_batches)
            masks, face_weights = [*masks, random_mask(whole, share), random_mask(whole, share)], [0.0, 1.0, 1.0]
        heard, k = talk.hear(batch["audio"], batch["word"]), len(masks)  # the same in all passes
        heard = tuple(h.repeat(k, 1, 1) for h in heard)
        out = talk.move(heard, whole.repeat(k, 1, 1), torch.cat(masks), batch["speaker"].repeat(k, 1))
        rec, cls = ({part: x.chunk(k) for part, x in kind.items()} for kind in out)
        loss = 0.0
        for i, weight in enumerate(face_weights):
            one = ({part: x[i] for part, x in kind.items()} for kind in (rec, cls))
            loss = loss + speech_loss(*one, latent, code, weight)
        right = torch.stack([(cls[part][0].argmax(-1) == code[part]).float().mean() for part in BODY]).mean()
        return StepOutput(loss, {"code_accuracy": right}, len(whole))

    @torch.no_grad()
    def speak(self, clip, frames: int, seed: Tensor | None = None) -> dict[str, Tensor]:
        """Motion (l ...) of the parts for a whole clip: windows of `frames`, the next one seeded by the last four of
        the one before; `seed` (4 337) in front, of the clip itself by default. All codes are decoded as one."""
        skeleton, step = self.trainer.datamodule.skeleton, frames - SEEDS
        samples = len(clip.audio) // len(clip.word)
        whole, found = (clip.whole[:SEEDS] if seed is None else seed), []
        length = len(clip.word) // 8 * 8
        for start in range(0, length - frames + 1, step):
            rows = slice(start, start + frames)
            given = torch.zeros(1, frames, whole.shape[-1])
            given[0, :SEEDS] = whole[-SEEDS:]
            audio = clip.audio[start * samples : (start + frames) * samples][None]
            speaker = torch.full((1, frames), clip.speaker)
            inputs = (audio, clip.word[rows][None], given, seed_mask(given, SEEDS), speaker)
            out = self.model(*(x.to(self.device) for x in inputs))
            codes = {part: out.cls[part].argmax(-1) for part in BODY}
            codes |= {"face": self.model.codes.face.quantizer.nearest(out.rec["face"])}
            whole = skeleton.whole_of({k: v[0].cpu() for k, v in self.model.codes.decode(codes).items()})
            kept = step if start + step + frames <= length else frames
            found.append({part: code[:, :kept] for part, code in codes.items()})
        codes = {part: torch.cat([f[part] for f in found], 1) for part in PARTS}
        return {part: motion[0].cpu() for part, motion in self.model.codes.decode(codes).items()}

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        rows = {"validation loss": f"{validation['loss']:.4f} (all but four frames hidden)"}
        rows |= {"codes named right": f"{100 * validation['code_accuracy']:.1f} % (body; all but four frames hidden)"}
        found = self.evaluate(run_dir, self.trainer.datamodule)
        return found._replace(rows=rows | found.rows)

    def evaluate(self, out: Path, data) -> Report:
        """Whole clips spoken and judged, beside their true motion and with the beats of another clip; measures.csv."""
        self.model.eval()
        skeleton, clips = data.skeleton, [c for c in data.held_out if len(c.word) // 8 * 8 >= data.frames]
        spoken = [self.speak(clip, data.frames) for clip in clips]
        whole = [skeleton.whole_of(parts) for parts in spoken]
        got = [skeleton.joints_of(w).numpy() for w in whole]
        truth = [skeleton.joints_of(c.whole[: len(w)]).numpy() for c, w in zip(clips, whole)]
        others = [c.beats for c in clips[1:] + clips[:1]]
        own, true, other = (self.consistency(*x) for x in ((got, clips), (truth, clips), (got, clips, others)))
        real = [skeleton.parts_of(c.whole, c.expression)["face"] for c in clips]
        faces = [(s["face"].numpy(), r[: len(s["face"])].numpy()) for s, r in zip(spoken, real)]
        found = {
            "beat_consistency": own,
            "beat_consistency_of_truth": true,
            "beat_consistency_of_others": other,
            "diversity": metrics.diversity(got),
            "diversity_of_truth": metrics.diversity(truth),
            "frechet": self.frechet(spoken, clips, skeleton),
            "face_mse": float(np.mean([metrics.face_error(*f) for f in faces])),
            "face_lvd": float(np.mean([metrics.face_velocity(*f) for f in faces])),
        }
        lines = [",".join(found), ",".join(f"{value:.6g}" for value in found.values())]
        (out / "measures.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = {
            "beat consistency": f"{own:.3f}; of the true motion {true:.3f}, "
            f"of this motion with another clip's beats {other:.3f}",
            "diversity": f"{found['diversity']:.3f} m; of the true motion {found['diversity_of_truth']:.3f} m",
            "Frechet distance": f"{found['frechet']:.4g} between latents of the upper body",
            "face": f"MSE {found['face_mse']:.4f}, LVD {found['face_lvd']:.4f} (jaw and expressions, no vertices)",
        }
        from ssmzoo.tasks.motion_figure import draw_gif, draw_trajectories

        figures = [draw_trajectories(out / "trajectories.png", got[0], truth[0], clips[0].beats)]
        figures += [draw_gif(out / "motion.gif", got[0], truth[0], skeleton.PARENT)]
        return Report(rows, {}, figures)

    def consistency(self, positions: list[np.ndarray], clips, beats: list[np.ndarray] | None = None) -> float:
        """Over clips, weighted by their lengths; NaN where no clip has a beat."""
        joints = self.trainer.datamodule.skeleton.BEAT_JOINTS
        beats = beats or [c.beats for c in clips]
        found = [(metrics.beat_consistency(p, b, joints), len(p)) for p, b in zip(positions, beats)]
        found = [(v, n) for v, n in found if v == v]
        return sum(v * n for v, n in found) / sum(n for _, n in found) if found else float("nan")

    @torch.no_grad()
    def frechet(self, spoken, clips, skeleton) -> float:
        """In place of the published feature net, whose weights need SMPL-X data: latents of stage 1, per frame."""
        encoder = self.model.codes.upper.encoder
        true = [skeleton.parts_of(c.whole, c.expression)["upper"] for c in clips]
        made, real = (
            torch.cat([encoder(x[None].to(self.device))[0] for x in xs]).cpu().numpy()
            for xs in ([s["upper"] for s in spoken], true)
        )
        return metrics.frechet(made, real)
