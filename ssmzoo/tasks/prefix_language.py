"""Language modelling behind a prefix that is read in both directions (JRT): next tokens there, masked tokens within."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmzoo.layers.decoder import reads_prefixes
from ssmzoo.tasks.base import StepOutput
from ssmzoo.tasks.language import IGNORE, LanguageModeling, token_cross_entropy


class PrefixLanguageModeling(LanguageModeling):
    """loss = cross entropy of the next token at positions from m on + mlm_weight * that of masked tokens before m.

    prefix            m, the leading positions read in both directions; None: half of the sequence
    mlm_weight        0.25 as released, which adds without dividing by the sum of the weights as the paper does
    mlm_probability   share of the prefix's tokens that are replaced by the mask, in training only
    mask_token        id of the mask; None: the model's own `mask_token`, a row of its vocabulary that no text has
    The other arguments as in LanguageModeling; keep_tokens is the share of the next tokens behind the prefix, masked
    tokens are all kept. Validation has no masks: the next tokens behind the prefix alone. The
    prefix is that of the whole sequence: documents packed into one are not kept apart, as in the released training.

    Raises ValueError for models that read in one direction only, prefixes that leave nothing to predict, and masks
    outside of the vocabulary. Unlike the released code, a masked token of id 0 counts like any other.
    Source: Arora et al. 2024 (arXiv 2407.05483), section 4.2; HazyResearch/prefix-linear-attention train/src/tasks.
    """

    prompts_both_ways = True

    def __init__(
        self,
        model,
        optim=None,
        prefix: int | None = None,
        mlm_weight: float = 0.25,
        mlm_probability: float = 0.15,
        mask_token: int | None = None,
        sample_tokens: int = 200,
        prompt: str | None = None,
        prompt_tokens: int = 64,
        eval_lengths: tuple[int, ...] | list[int] = (1, 2, 4, 8),
        keep_tokens: float = 1.0,
        keep_by: str = "loss",
        read_twice: bool = False,
    ):
        more = dict(keep_tokens=keep_tokens, keep_by=keep_by, read_twice=read_twice)
        super().__init__(model, optim, sample_tokens, prompt, prompt_tokens, eval_lengths, **more)
        declared = getattr(model, "reads_prefixes", None)
        if not (reads_prefixes(model) if declared is None else declared):
            raise ValueError(
                f"task=prefix_language needs a model that reads a prefix in both directions, such as jrt_rnn; "
                f"{type(model).__name__} reads in one direction only (task=language trains it)"
            )
        if (prefix is not None and prefix < 1) or mlm_weight < 0 or not 0 <= mlm_probability <= 1:
            raise ValueError(
                f"task: prefix={prefix} must be at least 1, mlm_weight={mlm_weight} at least 0 and "
                f"mlm_probability={mlm_probability} between 0 and 1"
            )
        mask_token = getattr(model, "mask_token", None) if mask_token is None else mask_token
        self.masks = mlm_weight > 0 and mlm_probability > 0
        if self.masks and mask_token is None:
            raise ValueError("task.mask_token is not given and the model keeps no row for it (model.mask_row=true)")
        self.prefix, self.mlm_weight, self.mlm_probability = prefix, mlm_weight, mlm_probability
        self.mask_token = mask_token

    def check_data(self, data) -> None:
        if hasattr(data, "seq_len"):
            self.prefix_of(data.seq_len)

    def prefix_of(self, length: int) -> int:
        """Leading positions of a sequence of this length that are read in both directions."""
        prefix = length // 2 if self.prefix is None else self.prefix
        if not 0 < prefix < length:
            raise ValueError(f"task.prefix = {prefix} leaves nothing to predict of {length} tokens (data.seq_len)")
        return prefix

    def read(self, batch: dict[str, Tensor]):
        """The model's output for a batch whose leading tokens are read in both directions."""
        ids = batch["input_ids"]
        return self.model(ids, prefix=self.prefix_of(ids.shape[1]))

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The next tokens (b l): none within the prefix, where they can be seen."""
        labels = batch["labels"].clone()
        labels[:, : self.prefix_of(labels.shape[1])] = IGNORE
        return labels

    def step(self, batch: dict[str, Tensor], training: bool) -> StepOutput:
        if not (training and self.masks):
            return super().step(batch, training)
        ids = batch["input_ids"]
        m = self.prefix_of(ids.shape[1])
        hidden = torch.rand(len(ids), m, device=ids.device) < self.mlm_probability
        masked = torch.cat([ids[:, :m].masked_fill(hidden, self.mask_token), ids[:, m:]], dim=1)
        out = self.model(masked, prefix=m)
        loss, plain, count = self.next_tokens(out.logits, batch)
        mlm, _ = token_cross_entropy(out.logits[:, :m], ids[:, :m].masked_fill(~hidden, IGNORE))
        losses = [v for k, v in out.aux.items() if k.endswith("_loss")]
        metrics = {"cross_entropy": plain.detach(), "mlm_loss": mlm.detach()}
        return StepOutput(loss, metrics, count, self.mlm_weight * mlm + sum(losses))
