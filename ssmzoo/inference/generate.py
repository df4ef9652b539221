"""Continue sequences with any model that carries its state: constant time and memory per token.

The prompts are read once (`prefill`); afterwards every token costs one step of the model on one token, whatever came
before it. Works with every model of the interface
`model(input_ids, state=None, *, mask=None, seq_idx=None) -> ModelOutput(logits, state, aux)`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssmzoo.inference.decoding import Decoding

FINISHED, BROKEN = -1, -2  # in place of a token: the sequence has ended; its logits were NaN


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits, in this order.

    repetition_penalty  logits of tokens seen in the sequence: divided by it if positive, else multiplied (1: off)
    temperature   logits are divided by it; 0 is greedy
    top_k         keep the k most likely tokens
    top_p         keep the fewest most likely tokens whose probabilities reach p
    min_p         keep tokens at least min_p times as likely as the most likely
    greedy        take the most likely token instead of drawing
    seed          of a random generator of its own; None: a fresh one each time

    Raises ValueError for values that have no meaning. Sources: Keskar et al. 2019 (repetition penalty, section 4.1),
    Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    greedy: bool = False
    seed: int | None = None

    def __post_init__(self):
        _check("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more, usually 0.7 to 1.2")
        _check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0 (1: off)")

    def filter(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits (b v) fp32 -> the same with tokens that may not be drawn at -inf. seen (b v) bool."""
        if seen is not None and self.repetition_penalty != 1:
            penalised = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalised, logits)
        if self.greedy or self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None:
            if self.top_k > logits.shape[-1]:
                raise ValueError(f"top_k = {self.top_k} exceeds the vocabulary of {logits.shape[-1]} tokens; lower it")
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -math.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(-1)
            beyond = probability.cumsum(-1) - probability >= self.top_p  # reached before this token
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -math.inf)
        if self.min_p is not None:
            probability = logits.softmax(-1)
            logits = logits.masked_fill(probability < self.min_p * probability.amax(-1, keepdim=True), -math.inf)
        return logits

    def draw(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator) -> Tensor:
        """Logits (b v) -> token (b). ValueError for logits that are NaN."""
        return usable(self.choose(logits, seen, generator))

    def choose(self, logits: Tensor, seen: Tensor | None, generator: torch.Generator) -> Tensor:
        """Logits (b v) -> token (b), BROKEN where a logit is NaN. Nothing is read from a GPU."""
        logits = logits.float()
        if seen is None and (self.greedy or self.temperature == 0):
            token = logits.argmax(-1)  # NaN counts as the largest
            return token.masked_fill(logits.gather(-1, token[:, None])[:, 0].isnan(), BROKEN)
        broken = logits.isnan().any(-1)
        logits = self.filter(logits.masked_fill(broken[:, None], 0), seen)
        if not self.greedy and self.temperature != 0:
            chance = logits.softmax(-1)  # torch.multinomial's way, without its checks: they wait for the GPU
            logits = chance / torch.empty_like(chance).exponential_(generator=generator)
        return logits.argmax(-1).masked_fill(broken, BROKEN)


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Tensor,
    state: Any = None,
    *,
    mask: Tensor | None = None,
    chunk: int | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Any]:
    """Read a prompt, in chunks of at most `chunk` tokens if given (the same result in less memory), or whole and in
    both directions.

    input_ids (b l), mask (b l) bool or None: True = real token. Returns the logits (b v) after the last position, and
    the state. Pad on the left, so that the last position is real in every row.
    """
    b, length = input_ids.shape
    if length == 0:
        raise ValueError("input_ids has length 0; a prompt needs at least one token")
    _check("chunk", chunk, chunk is None or chunk >= 1, "at least 1, or None for one pass")
    if bidirectional and chunk is not None:
        raise ValueError(f"prefill_chunk = {chunk}: a prompt that is read in both directions is read whole")
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if bidirectional:
        last["prefix"] = length if mask is None else mask.sum(1)
    for start in range(0, length, chunk or length):
        part = slice(start, start + (chunk or length))
        logits, state, _ = model(input_ids[:, part], state, mask=None if mask is None else mask[:, part], **last)
    return logits[:, -1], state


def stream(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | Tensor] | Tensor,
    max_new_tokens: int = 256,
    *,
    stop_tokens: Collection[int] = (),
    prefill_chunk: int | None = None,
    vocab_size: int | None = None,
    bidirectional: bool = False,
    **sampling,
) -> Iterator[Tensor]:
    """Yield the next token of every prompt, (b) int64 on the CPU; FINISHED (-1) where a sequence has ended.

    prompts        token ids, one sequence per prompt, of any lengths from 1
    stop_tokens    ids that end a sequence; they are not yielded
    prefill_chunk  read the prompts in pieces of so many tokens
    vocab_size     draw only from the first so many ids, for models whose head is wider than the tokenizer's vocabulary
    bidirectional  read the prompts in both directions, with models that read prefixes
    sampling       the arguments of `Sampling`: temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed

    The model is in eval mode meanwhile. Raises ValueError for unusable arguments and for logits that are NaN.
    """
    for name, value in ("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk), ("vocab_size", vocab_size):
        _check(name, value, value is None or value >= 1, "at least 1")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    input_ids, mask = pad_left(prompts, device)
    reading = {"chunk": prefill_chunk, "bidirectional": bidirectional}
    return _steps(
        model, input_ids, mask, max_new_tokens, Sampling(**sampling), sorted(stop_tokens), reading, vocab_size
    )


def _steps(model, input_ids, mask, n, sampling: Sampling, stop_tokens, reading, vocab_size) -> Iterator[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits, state = prefill(model, input_ids, mask=mask, **reading)
        generator = torch.Generator(logits.device)
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
        stop = torch.tensor(stop_tokens, dtype=torch.long, device=logits.device)
        seen = _seen(input_ids, mask, logits[:, :vocab_size]) if sampling.repetition_penalty != 1 else None
        alive = torch.ones(len(input_ids), dtype=torch.bool, device=logits.device)
        advance = Decoding(model, state)
        for step in range(1, n + 1):
            token = sampling.choose(logits[:, :vocab_size], seen, generator)
            if stop_tokens:
                alive = alive & (token[:, None] != stop).all(-1)
                told = _Told(torch.where(alive | (token == BROKEN), token, FINISHED))
            else:
                told = _Told(token)
            if seen is not None:
                seen.scatter_(1, token.clamp(min=0)[:, None], True)
            ahead = step < n and advance.static is not None  # the GPU goes on while the host looks at the token
            if ahead:
                logits = advance(token.clamp(min=0))
            tokens = usable(told.read())
            if (tokens == FINISHED).all():
                return
            yield tokens
            if step < n and not ahead:  # a sequence that has ended stands still
                logits = advance(token.clamp(min=0), None if (tokens != FINISHED).all() else alive)
    finally:
        for module, training in modes:
            module.training = training


def usable(tokens: Tensor) -> Tensor:
    """The tokens (b) themselves. ValueError when one is BROKEN."""
    if (tokens == BROKEN).any():
        raise ValueError("the model's logits are NaN; its weights or its input are not usable")
    return tokens


class _Told:
    """A GPU's tokens on their way to the host: what is started meanwhile is not waited for."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if tokens.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> Tensor:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int] | Tensor] | Tensor, max_new_tokens: int = 256, **options
) -> list[list[int]]:
    """The new tokens of every prompt, without the prompt. `options` are those of `stream` and `Sampling`."""
    new = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, **options):
        for sequence, token in zip(new, tokens.tolist()):
            if token != FINISHED:
                sequence.append(token)
    return new


def pad_left(prompts: Sequence[Sequence[int] | Tensor] | Tensor, device=None) -> tuple[Tensor, Tensor | None]:
    """Prompts of any lengths -> ids (b l), mask (b l) bool, True = real token; None when all are equally long."""
    rows = [torch.as_tensor(prompt).detach().cpu() for prompt in prompts]
    if not rows:
        raise ValueError("no prompt is given; give at least one")
    for i, row in enumerate(rows):
        if row.ndim != 1 or row.is_floating_point() and row.numel():
            raise ValueError(f"prompt {i} is a {row.dtype} tensor of shape {tuple(row.shape)}; expected token ids")
        if row.numel() == 0:
            raise ValueError(f"prompt {i} is empty; give at least one token to continue from")
    longest = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = True
    return input_ids.to(device), None if mask.all() else mask.to(device)


def _seen(input_ids: Tensor, mask: Tensor | None, logits: Tensor) -> Tensor:
    """(b v) bool: which tokens occur in the prompts."""
    b, v = logits.shape
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    rows = torch.arange(b, device=input_ids.device)[:, None].expand_as(input_ids)
    real = real & (input_ids < v)
    seen = torch.zeros(b, v, dtype=torch.bool, device=logits.device)
    seen[rows[real], input_ids[real]] = True
    return seen


def _check(name: str, value, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{name} = {value}; it must be {expected}")
