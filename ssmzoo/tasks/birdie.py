"""Training on a mixture of Birdie's objectives, whose weights follow rewards."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmzoo.layers.decoder import reads_prefixes
from ssmzoo.suggest import from_slot
from ssmzoo.tasks.base import Report, StepOutput
from ssmzoo.tasks.birdie_figure import draw_mixture
from ssmzoo.tasks.language import LanguageModeling, token_cross_entropy
from ssmzoo.tasks.mixture_controller import ControllerSettings, MixtureController


class Birdie(LanguageModeling):
    """Cross entropy of the answers, plus the model's auxiliary losses; validation has a loss per objective.

    sample_tokens   length of the continuation shown at the end of a run; 0: none
    prompt          its beginning; None: `prompt_tokens` tokens of the held-out split
    keep_tokens, keep_by   the training loss of the hardest share of the answers' tokens (LanguageModeling)
    bidirectional   read what stands before the answers in both directions; None: where the model can
    controller      fields of ControllerSettings, for data.mixture=birdie

    With data.mixture=birdie every validation moves the mixture (tasks/mixture_controller.py), otherwise its weights
    stay. The report holds mixture.csv and a curve of the weights.
    Raises ValueError for bidirectional=True with a model that reads in one direction only.
    """

    def __init__(
        self,
        model,
        optim=None,
        sample_tokens: int = 200,
        prompt: str | None = None,
        prompt_tokens: int = 64,
        bidirectional: bool | None = None,
        controller: dict[str, Any] | None = None,
        keep_tokens: float = 1.0,
        keep_by: str = "loss",
    ):
        kept = dict(keep_tokens=keep_tokens, keep_by=keep_by)
        super().__init__(model, optim, sample_tokens, prompt, prompt_tokens, **kept)
        able = reads_prefixes(model)
        if bidirectional and not able:
            raise ValueError(
                f"task.bidirectional=true: {type(model).__name__} reads in one direction only; leave it out, or take a "
                f"model such as gated_ssm, hawk or transformer"
            )
        self.bidirectional = able if bidirectional is None else bidirectional
        self.settings = from_slot("task.controller", controller, ControllerSettings)
        self.controller: MixtureController | None = None
        self.history: list[dict[str, Any]] = []  # of every validation: step, losses, the weights until then

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if stage == "fit" and getattr(data, "adaptive", False) and self.controller is None:
            kinds = [objective.kind for objective in data.objectives]
            self.controller = MixtureController(kinds, self.settings, seed=data.seed)

    def read(self, batch: dict[str, Tensor]):
        more = {"prefix": batch["prefix"]} if self.bidirectional else {}
        return self.model(batch["input_ids"], seq_idx=batch["seq_idx"], **more)

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        out = super().step(batch, training)
        if training:
            return out
        name = self.trainer.datamodule.names[int(batch["objective"][0])]
        return out._replace(metrics=out.metrics | {name: out.loss.detach()})

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        data = self.trainer.datamodule
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        losses = [self.validation[f"val/{name}"] for name in data.names if f"val/{name}" in self.validation]
        if len(losses) < len(data.names):  # trainer.limit_val_batches: there is nothing to judge by
            return
        weights = data.weights.tolist()
        self.history.append({"step": self.trainer.global_step, "losses": losses, "weights": weights})
        if self.controller is not None:
            data.set_weights(self.controller.choose(self.trainer.global_step, losses, weights))

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        return means

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        held = None if self.controller is None else self.controller.state_dict()
        checkpoint["task"] |= {"history": self.history, "controller": held}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("task", {})
        self.history = list(saved.get("history", []))
        if self.controller is not None and saved.get("controller"):
            self.controller.load_state_dict(saved["controller"])

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        data = self.trainer.datamodule
        rows = {"validation loss": f"{validation['loss']:.4f} nats per token of the answers"}
        rows |= {f"validation loss, {name}": f"{validation[name]:.4f}" for name in data.names if name in validation}
        rows["prefixes"] = "read in both directions" if self.bidirectional else "read in one direction"
        rows["mixture"] = f"{data.mixture}, {'moved by the rewards' if data.adaptive else 'its weights stay'}"
        figures = []
        if self.history:
            self.write_history(run_dir / "mixture.csv", data.names)
            figures = [draw_mixture(self.history, data.weights.tolist(), data.objectives, run_dir / "mixture.png")]
        return Report(rows, {"sampled continuation": self.sample(data)} if self.sample_tokens else {}, figures)

    def write_history(self, path: Path, names: list[str]) -> None:
        """A line per validation: the weights that were trained on before it, and the losses it measured."""
        with path.open("w", newline="") as file:
            out = csv.writer(file)
            out.writerow(["step", *(f"weight/{name}" for name in names), *(f"loss/{name}" for name in names)])
            for row in self.history:
                out.writerow([row["step"], *(f"{v:.6f}" for v in row["weights"] + row["losses"])])

    @torch.no_grad()
    def sample(self, data) -> str:
        """`prompt` or held-out text, a mark, and what the model makes of it (temperature 0.8, top-p 0.95, seed 0)."""
        from ssmzoo.inference.generate import generate

        text = list(data.tokens("val")[: self.prompt_tokens]) if self.prompt is None else data.encode(self.prompt)
        was_training, end = self.model.training, data.tokenizer.end_token
        new = generate(
            self.model.eval(),
            [data.prefix_prompt(text)],
            max_new_tokens=self.sample_tokens,
            stop_tokens=() if end is None else (end,),
            vocab_size=data.tokenizer.vocab_size,
            bidirectional=self.bidirectional,
            temperature=0.8,
            top_p=0.95,
            seed=0,
        )[0]
        self.model.train(was_training)
        return f"{data.decode(text)}▶{data.decode(new)}"

    @torch.no_grad()
    def evaluate(self, out: Path, data) -> Report:
        """The loss of every objective, with prefixes read in both directions and in one."""
        rows, lines = {}, ["objective,both_directions,one_direction"]
        for batch, name in zip(data.val_dataloader(), data.names):
            batch = {k: v.to(self.device) for k, v in batch.items()}
            more = ({"prefix": batch["prefix"]} if reads_prefixes(self.model) else None, {})
            losses = [
                None if prefix is None else float(self.loss_of(batch, prefix)) for prefix in more
            ]  # nats per token
            lines.append(",".join([name, *("" if loss is None else f"{loss:.6f}" for loss in losses)]))
            both = "" if losses[0] is None else f"{losses[0]:.4f} read in both directions, "
            rows[name] = f"{both}{losses[1]:.4f} in one"
        (out / "objectives.csv").write_text("\n".join(lines) + "\n")
        return Report(rows, {}, [])

    def loss_of(self, batch: dict[str, Tensor], prefix: dict[str, Tensor]) -> Tensor:
        logits = self.model(batch["input_ids"], seq_idx=batch["seq_idx"], **prefix).logits
        return token_cross_entropy(logits, batch["labels"])[0]
