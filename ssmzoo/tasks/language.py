"""Language modelling: next-token prediction, reported per token, per byte and against an order-0 model."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.layers.state import state_bytes
from ssmzoo.suggest import nearest
from ssmzoo.tasks.base import Report, StepOutput, Task
from ssmzoo.tasks.metrics.ngram import unigram_bits_per_byte
from ssmzoo.tasks.objectives.tokens import SCORES, kept_tokens, select_tokens

IGNORE = -100  # label of a position that is not to be predicted


def token_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(mean cross entropy in nats over labels other than -100, how many there are). logits (b l v), labels (b l)."""
    count = (labels != IGNORE).sum()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / count.clamp(min=1), count


class LanguageModeling(Task):
    """Cross entropy of the next token plus the model's own auxiliary losses (load balancing, router z-loss).

    sample_tokens    length of the continuation shown at the end of a run; 0: none
    prompt           its beginning; None: the first `prompt_tokens` tokens of the held-out split
    eval_lengths     contexts `eval.py` measures, as multiples of the trained one
    keep_tokens      share of the tokens that the training loss is a mean over, the hardest of every batch; 1: all
    keep_by          what is hard: a token's loss, or the entropy of its prediction
    read_twice       `eval.py` also measures the second half of held-out sequences after the first half was read twice
    """

    unit = "tokens"
    prompts_both_ways = False  # whether the model was trained to read what stands before in both directions

    def __init__(
        self,
        model,
        optim=None,
        sample_tokens: int = 200,
        prompt: str | None = None,
        prompt_tokens: int = 64,
        eval_lengths: tuple[int, ...] | list[int] = (1, 2, 4, 8),
        keep_tokens: float = 1.0,
        keep_by: str = "loss",
        read_twice: bool = False,
    ):
        super().__init__(model, optim)
        if sample_tokens < 0 or prompt_tokens < 1 or any(n < 1 for n in eval_lengths):
            raise ValueError(
                f"task: sample_tokens={sample_tokens} must be at least 0, prompt_tokens={prompt_tokens} and "
                f"every one of eval_lengths={list(eval_lengths)} at least 1"
            )
        if not 0 < keep_tokens <= 1:
            raise ValueError(f"task.keep_tokens = {keep_tokens} must lie in (0, 1]: a share of the tokens; 1 keeps all")
        if keep_by not in SCORES:
            known = " or ".join(SCORES)
            raise ValueError(f"task.keep_by is {keep_by!r}; expected {known}{nearest(str(keep_by), SCORES)}")
        self.keep_tokens, self.keep_by = keep_tokens, keep_by
        self.sample_tokens, self.prompt, self.prompt_tokens = sample_tokens, prompt, prompt_tokens
        self.eval_lengths, self.read_twice = tuple(eval_lengths), read_twice
        self._load: Tensor | None = None  # tokens per expert, summed over the validation
        self._trained_dropped: Tensor | None = None

    def step(self, batch, training: bool) -> StepOutput:
        out = self.read(batch)
        losses = {k: v for k, v in out.aux.items() if k.endswith("_loss")}
        metrics = {k: v.detach() for k, v in out.aux.items() if v.numel() == 1}
        if not training:
            loss, count = token_cross_entropy(out.logits, self.labels(batch))
            load = out.aux.get("tokens_per_expert")
            if load is not None:
                self._load = load.double() if self._load is None else self._load + load.double()
            return StepOutput(loss, metrics, count)
        self.expert_load = out.aux.get("tokens_per_expert")
        auxiliary = sum(losses.values()) if losses else None
        loss, plain, count = self.next_tokens(out.logits, batch)
        metrics["cross_entropy"] = plain.detach()
        return StepOutput(loss, metrics, count, auxiliary)

    def next_tokens(self, logits: Tensor, batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross entropy of the tokens kept in training and of all labelled ones, and the number of the latter."""
        labels = self.labels(batch)
        plain, count = token_cross_entropy(logits, labels)
        if self.keep_tokens == 1:
            return plain, plain, count
        kept = select_tokens(logits, labels, self.keep_tokens, self.keep_by, IGNORE)
        return token_cross_entropy(logits, kept)[0], plain, count

    def read(self, batch):
        """The model's output for a batch of ids (b l)."""
        return self.model(batch["input_ids"], seq_idx=batch.get("seq_idx"))

    def labels(self, batch) -> Tensor:
        """The next tokens (b l); -100 where none is to be predicted."""
        return batch["labels"]

    def items(self, batch) -> int:
        return batch["input_ids"].numel()

    def labelled(self, batch) -> Tensor:
        count = (self.labels(batch) != IGNORE).sum()
        return count if self.keep_tokens == 1 else kept_tokens(count, self.keep_tokens)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._load = None

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        nats = means["loss"]
        per_token = self.trainer.datamodule.bytes_per_token()
        return means | {"perplexity": math.exp(min(nats, 700)), "bits_per_byte": nats / math.log(2) / per_token}

    def report(self, run_dir: Path, validation: dict[str, float]) -> Report:
        data = self.trainer.datamodule
        rows = {
            "validation loss": f"{validation['loss']:.4f} nats per token",
            "perplexity": f"{validation['perplexity']:.3f}",
            "bits per byte": f"{validation['bits_per_byte']:.4f}",
            "bits per byte, order-0 (unigram) model": f"{unigram_bits_per_byte(data):.4f}",
        }
        if length := getattr(data, "seq_len", 0):
            held, size = state_bytes(self.model, length), sum(p.numel() for p in self.model.parameters())
            rows["state"] = f"{held:,} bytes per sequence of {length} tokens"
            lines = f"length,state_bytes,parameters,loss\n{length},{held},{size},{validation['loss']:.6f}\n"
            (run_dir / "state.csv").write_text(lines, encoding="utf-8")
        if self._load is not None:
            share = self._load / self._load.sum(-1, keepdim=True).clamp(min=1)
            for layer, row in enumerate(share if share.ndim == 2 else share[None]):
                rows[f"experts' load, layer {layer}"] = " ".join(f"{100 * x:.0f}%" for x in row.tolist())
        if "dropped_fraction" in validation:
            rows["tokens dropped"] = f"{100 * validation['dropped_fraction']:.2f} % in validation"
            if self._trained_dropped is not None:
                rows["tokens dropped"] += f", {100 * float(self._trained_dropped):.2f} % in the last training step"
        return Report(rows, {"sampled continuation": self.sample(data)} if self.sample_tokens else {}, [])

    def on_train_end(self) -> None:
        self._trained_dropped = self.trainer.callback_metrics.get("train/dropped_fraction")

    @torch.no_grad()
    def sample(self, data) -> str:
        """`prompt` or held-out text, a mark, and what the model makes of it (temperature 0.8, top-p 0.95, seed 0)."""
        from ssmzoo.inference.generate import generate

        if self.prompt is None:
            first = next(iter(data.val_dataloader()))["input_ids"][0, : self.prompt_tokens].tolist()
        else:
            first = data.encode(self.prompt)
        was_training, end = self.model.training, data.tokenizer.end_token
        new = generate(
            self.model.eval(),
            [first],
            max_new_tokens=self.sample_tokens,
            stop_tokens=() if end is None else (end,),
            temperature=0.8,
            top_p=0.95,
            seed=0,
            bidirectional=self.prompts_both_ways,
        )[0]
        self.model.train(was_training)
        return f"{data.decode(first)}▶{data.decode(new)}"

    @torch.no_grad()
    def evaluate(self, out: Path, data) -> Report:
        """Loss at contexts of 1, 2, 4, 8 times the trained length on the same held-out tokens: table, CSV, figure."""
        results = []
        for factor in self.eval_lengths:
            longer = data.with_seq_len(data.seq_len * factor, batch_size=max(1, data.batch_size // factor))
            total, count = 0.0, 0
            for batch in longer.val_dataloader():
                batch = {k: v.to(self.device) for k, v in batch.items()}
                loss, n = token_cross_entropy(self.read(batch).logits, self.labels(batch))
                total, count = total + float(loss) * int(n), count + int(n)
            nats = total / max(count, 1)
            results.append((data.seq_len * factor, nats, math.exp(nats), nats / math.log(2) / data.bytes_per_token()))
        lines = ["context,loss,perplexity,bits_per_byte", *(f"{n},{a:.6f},{p:.6f},{b:.6f}" for n, a, p, b in results)]
        (out / "length_extrapolation.csv").write_text("\n".join(lines) + "\n")
        rows = {f"context {n}": f"loss {a:.4f}, perplexity {p:.3f}, bits per byte {b:.4f}" for n, a, p, b in results}
        if self.read_twice:
            rows |= self.second_halves(data)
        return Report(rows, {}, [_draw_lengths(results, data.seq_len, out / "length_extrapolation.png")])

    def second_halves(self, data) -> dict[str, str]:
        """Loss over the second half of held-out sequences whose first half was read once and twice (JRT-Prompt)."""
        newline = torch.tensor(data.encode("\n"), device=self.device)
        total, count = torch.zeros(2, dtype=torch.float64), 0
        for batch in data.val_dataloader():
            ids, labels = batch["input_ids"].to(self.device), batch["labels"].to(self.device)
            half = ids.shape[1] // 2
            again = torch.cat([ids[:, :half], newline.expand(len(ids), -1), ids], dim=1)
            for i, read in enumerate((ids, again)):
                lead = read.shape[1] - ids.shape[1] + half  # what is read before the second half
                more = {"prefix": lead} if self.prompts_both_ways else {}
                loss, n = token_cross_entropy(self.model(read, **more).logits[:, lead:], labels[:, half:])
                total[i] += float(loss) * int(n)
            count += int(n)
        once, twice = (total / max(count, 1)).tolist()
        return {
            "second half of a context, first half read once": f"loss {once:.4f}",
            "second half of a context, first half read twice": f"loss {twice:.4f}",
        }


def _draw_lengths(results, trained: int, png: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    axes.plot([r[0] for r in results], [r[3] for r in results], marker="o", color="#0072B2", label="held-out text")
    axes.axvline(trained, color="#D55E00", linestyle="--", label=f"trained at {trained}")
    axes.set(xscale="log", xlabel="context (tokens)", ylabel="bits per byte", title="length extrapolation")
    axes.set_xticks([r[0] for r in results], [str(r[0]) for r in results])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(png, dpi=120)
    plt.close(figure)
    return png
