"""Questions about pictures: a decoder learns text and is frozen, then an adapter learns to show it pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmzoo.adapt.ssmi import SSMI, save_adapter
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.language import token_cross_entropy

LONGEST = 64  # bytes of an answer
NOISES = (0.1, 0.2, 0.4)  # standard deviations, where pixels lie between 0 and 1


class VisualQuestions(Task):
    """Train the adapter of a `VisualDecoder` on answers; two stages of one schedule, as the paper has them.

    decoder_steps   train the decoder on text first, unless init_from brought a trained one; 0: refuse then
    decoder_lr, decoder_batch   learning rate and texts per step of that
    align_steps     first stage: captions of the pictures, and of every visual token the next one from the memories
                    (weight `reconstruct`); then answers alone

    Validation asks about pictures that were held out: an answer is right when all of its bytes are the most likely
    ones. Cross entropies are in nats per byte of the answers.
    """

    unit = "questions"
    monitor, mode = "accuracy", "max"

    def __init__(
        self,
        model: nn.Module,
        optim: Callable[[nn.Module], Any] | None = None,
        decoder_steps: int = 300,
        decoder_lr: float = 2e-3,
        decoder_batch: int = 64,
        align_steps: int = 50,
        reconstruct: float = 1.0,
    ):
        super().__init__(model, optim)
        if min(decoder_steps, align_steps, reconstruct) < 0 or decoder_lr <= 0 or decoder_batch < 1:
            raise ValueError(
                f"task.decoder_steps = {decoder_steps}, task.align_steps = {align_steps} and task.reconstruct = "
                f"{reconstruct} must not be negative, task.decoder_lr = {decoder_lr} and task.decoder_batch = "
                f"{decoder_batch} must be positive"
            )
        if not hasattr(model, "plain_decoder"):
            raise ValueError(
                f"the task questions needs a decoder that is shown pictures (ssmi); {type(model).__name__} is none"
            )
        self.decoder_steps, self.decoder_lr, self.decoder_batch = decoder_steps, decoder_lr, decoder_batch
        self.align_steps, self.reconstruct = align_steps, reconstruct

    def check_data(self, data) -> None:
        if not self.model.trained and not self.decoder_steps:
            raise ValueError(
                "the decoder is not trained: give init_from=<a run of the same decoder>, or task.decoder_steps above 0"
            )

    def on_fit_start(self) -> None:
        """The decoder, where no trained one was given and none is in a checkpoint."""
        trained, total = self.model.trainable()
        print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)", flush=True)
        if self.model.trained or not self.decoder_steps:
            return
        print(f"decoder: {self.decoder_steps} steps on text without pictures (or give init_from)", flush=True)
        decoder, data = self.model.plain_decoder().to(self.device), self.trainer.datamodule
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=self.decoder_lr, weight_decay=0.01)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.decoder_lr, self.decoder_steps, pct_start=0.1)
        draw = np.random.default_rng(data.seed)
        for _ in range(self.decoder_steps):
            ids, labels = (t.to(self.device) for t in data.text_batch(self.decoder_batch, draw))
            loss, _ = token_cross_entropy(decoder(ids).logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            rates.step()
        self.model.reader.backbone.load_state_dict(decoder.state_dict(), strict=False)
        self.model.trained.fill_(self.decoder_steps)
        print(f"decoder: {float(loss.detach()):.4f} nats a byte", flush=True)

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        visual = batch["visual"]
        if training and self.trainer.global_step < self.align_steps:
            logits = self.model(batch["caption_ids"], visual=visual).logits
            caption, _ = token_cross_entropy(logits, batch["caption_labels"])
            rebuilt = self.model.reader.reconstruction(visual)
            metrics = {"caption": caption.detach(), "reconstruction": rebuilt.detach()}
            return StepOutput(caption + self.reconstruct * rebuilt, metrics, len(visual))
        logits, labels = self.model(batch["input_ids"], visual=visual).logits, batch["labels"]
        loss, _ = token_cross_entropy(logits, labels)
        right = ((logits.argmax(-1) == labels) | (labels < 0)).all(1).float()  # (b)
        metrics = {"accuracy": right.mean()}
        if not training:
            for number, name in enumerate(self.trainer.datamodule.source.kinds):
                asked = (batch["kind"] == number).float()
                metrics |= {f"right {name}": (right * asked).mean(), f"asked {name}": asked.mean()}
        return StepOutput(loss, metrics, len(visual))

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """Accuracy of every kind of question that was asked."""
        plain = {k: v for k, v in means.items() if not k.startswith(("right ", "asked "))}
        kinds = [k.removeprefix("asked ") for k, v in means.items() if k.startswith("asked ") and v > 0]
        return plain | {f"accuracy_{k}": means[f"right {k}"] / means[f"asked {k}"] for k in kinds}

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        data, reader = self.trainer.datamodule, self.model.reader
        trained, total = self.model.trainable()
        rows = {"answers right": f"{100 * validation['accuracy']:.1f} % of {len(data.held_out):,} held-out questions"}
        rows |= {
            f"  {data.source.kinds[n]}": f"{100 * value:.1f} %" + ("" if n in seen else " (never asked in training)")
            for seen in [{a.kind for a in data.training}]
            for n, name in enumerate(data.source.kinds)
            if (value := validation.get(f"accuracy_{name}")) is not None
        }
        rows |= {f"answers right, {name}": f"{100 * value:.1f} %" for name, value in data.baselines().items()}
        rows["trained parameters"] = f"{trained:,} of {total:,} ({100 * trained / total:.2f} %)"
        if isinstance(reader, SSMI) and self.optim is not None and not (run_dir / "adapter").exists():  # it trained
            rows["the memories alone"] = str(save_adapter(reader, run_dir / "adapter"))
        return Report(rows, {}, [self.draw(run_dir, data)])

    @torch.no_grad()
    def evaluate(self, out: Path, data) -> Report:
        """Answers written byte by byte with carried state, and under noise on the pixels."""
        clean = self.accuracy(data, data.visual)
        draw = torch.Generator().manual_seed(data.seed)
        noise = torch.randn(data.visual.shape, generator=draw)
        rows = {"answers right, byte by byte": f"{100 * clean:.1f} %"}
        for size in NOISES:
            rows[f"  noise of {size:g} on the pixels"] = (
                f"{100 * self.accuracy(data, data.visual + size * noise):.1f} %"
            )
        return Report(rows, {}, [])

    def accuracy(self, data, visual: Tensor) -> float:
        said = self.answers(data.held_out, visual)
        return float(np.mean([a == b.answer for a, b in zip(said, data.held_out)]))

    @torch.no_grad()
    def answers(self, asked: list, visual: Tensor) -> list[str]:
        """What the model writes behind every question about pictures out of `visual` (n m w), most likely bytes."""
        was_training, found = self.model.training, [""] * len(asked)
        self.model.eval()
        for question in sorted({a.question for a in asked}):
            places = [i for i, a in enumerate(asked) if a.question == question]
            for start in range(0, len(places), 256):
                some = places[start : start + 256]
                seen = visual[[asked[i].picture for i in some]].to(self.device)
                for i, answer in zip(some, self._write(f"\n{question} ", seen)):
                    found[i] = answer
        self.model.train(was_training)
        return found

    def _write(self, prompt: str, visual: Tensor) -> list[str]:
        ids = torch.tensor(list(prompt.encode()), device=visual.device).expand(len(visual), -1)
        logits, state, _ = self.model(ids, visual=visual)
        written, ended = [], torch.zeros(len(visual), dtype=torch.bool, device=visual.device)
        for _ in range(LONGEST):
            token = logits[:, -1].argmax(-1)
            ended = ended | (token == ord("\n"))
            written.append(token.masked_fill(ended, ord("\n")))
            if bool(ended.all()):
                break
            logits, state, _ = self.model(token[:, None], state)
        rows = torch.stack(written, 1).cpu().tolist()
        return [bytes(row).decode("utf-8", "replace").partition("\n")[0] for row in rows]

    def draw(self, out: Path, data) -> Path:
        from ssmzoo.tasks.questions_figure import draw_questions

        pictures = list(dict.fromkeys(a.picture for a in data.held_out))[:10]
        shown = [a for a in data.held_out if a.picture in pictures]
        return draw_questions(out / "questions.png", data.source.pictures, shown, self.answers(shown, data.visual))
