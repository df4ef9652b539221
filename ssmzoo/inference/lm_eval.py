"""The zoo's language models for lm-eval (EleutherAI's evaluation harness): the model type "ssmzoo".

    ssmzoo eval runs/mamba --lm-eval hellaswag,lambada_openai
    python -m ssmzoo.inference.lm_eval --model ssmzoo --model_args pretrained=runs/mamba --tasks hellaswag

A state-space model has no longest context, so a text is read from its beginning, in pieces, however long it is;
`max_length` sets the windows that Transformers need, for comparisons with them.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from ssmzoo.inference.generate import FINISHED, stream
from ssmzoo.inference.likelihood import log_likelihoods
from ssmzoo.inference.subject import load_subject
from ssmzoo.suggest import nearest


@register_model("ssmzoo")
class ZooLM(TemplateLM):
    """pretrained       run folder, checkpoint or name of released weights of a language model
    batch_size          texts per pass | max_length  tokens of context, None: all of them
    max_gen_toks        tokens that are generated unless the task says so
    prefix_token_id     stands before a text without context; None: the end token, else a line break
    device              "cpu", "cuda", ...
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 8,
        max_length: int | str | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        device: str | None = None,
        **ignored: Any,
    ):
        super().__init__()
        if unknown := sorted(set(ignored) - {"max_batch_size"}):  # what lm-eval gives to every model
            raise TypeError(f"the model type ssmzoo takes no argument {unknown[0]!r}")
        subject = load_subject(pretrained, device)
        if subject.tokenizer is None:
            raise ValueError(f"{pretrained} has no tokenizer, so it is no language model that lm-eval can evaluate")
        self.model, self.text = subject.model, subject.tokenizer
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        self.max_length = None if max_length is None else int(max_length)
        self.max_gen_toks, self.prefix = int(max_gen_toks), prefix_token_id

    @property
    def eot_token_id(self) -> int:
        end = self.text.end_token
        return self.text.encode("\n")[0] if end is None else end

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.prefix is None else int(self.prefix)

    @property
    def tokenizer_name(self) -> str:
        return self.text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text; nothing is ever put before or behind it."""
        return self.text.encode(string)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """[(strings, context ids, continuation ids)] -> [(log-likelihood in nats, is it the greedy continuation)]."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = [i for i in order[start : start + self.batch_size] if requests[i][2]]
            rows = [self._cut(*requests[i][1:]) for i in batch]
            scores = log_likelihoods(self.model, rows, [len(requests[i][2]) for i in batch]) if batch else []
            for i, score in zip(batch, scores):
                results[i] = (score.total, score.greedy)
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """Context and continuation, the oldest context left out beyond max_length."""
        row = list(context) + list(continuation)
        return row if self.max_length is None else row[-max(self.max_length, len(continuation)) - 1 :]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts: in one window, or in those of max_length as for Transformers."""
        totals = []
        for (string,) in (request.args for request in requests):
            ids = self.tok_encode(string)
            if self.max_length is None:
                windows = [([self.prefix_token_id], ids)]
            else:
                found = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
                windows = [utils.make_disjoint_window(window) for window in found]
            scores = self._loglikelihood_tokens([(None, *window) for window in windows])
            totals.append(sum(score for score, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), totals[-1])
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of the task's stop strings, greedy unless the task asks for sampling."""
        texts = []
        for context, options in (request.args for request in requests):
            options = dict(options)
            until = options.pop("until", None) or []
            until = [until] if isinstance(until, str) else list(until)
            length = int(options.pop("max_gen_toks", self.max_gen_toks))
            texts.append(self._continue(context, [stop for stop in until if stop], length, sampling(options)))
            self.cache_hook.add_partial("generate_until", (context, options), texts[-1])
        return texts

    def _continue(self, context: str, until: list[str], length: int, options: dict[str, Any]) -> str:
        ids = self.tok_encode(context) or [self.prefix_token_id]
        ids = ids if self.max_length is None else ids[-max(1, self.max_length - length) :]
        end = set() if self.text.end_token is None else {self.text.end_token}
        decoder, text = self.text.decoder(), ""
        for token in stream(
            self.model, [ids], length, stop_tokens=end, vocab_size=self.text.vocab_size, prefill_chunk=2048, **options
        ):
            text += decoder.push([] if int(token) == FINISHED else token.tolist())
            if any(stop in text for stop in until):
                break
        text += decoder.flush()
        return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def sampling(options: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's (that is transformers') words for sampling -> those of `ssmzoo.inference.generate.Sampling`."""
    draws = options.pop("do_sample", options.get("temperature", 0) > 0)
    known = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"generate_until: {unknown[0]} = {options[unknown[0]]!r} is not known; known: {', '.join(known)}"
        )
    return {k: v for k, v in options.items() if draws or k == "repetition_penalty"} | (
        {} if draws else {"greedy": True}
    )


def evaluate(model: ZooLM, tasks: list, *, include_path: str | None = None, **options) -> dict:
    """lm-eval's results. tasks: names, or configurations as dictionaries; include_path: a folder of task files; options
    are those of lm_eval.simple_evaluate. Raises ValueError for unknown names."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    names = [task for task in tasks if isinstance(task, str)]
    known = manager.all_tasks
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}{nearest(unknown[0], known)}")
    return simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    torch.set_grad_enabled(False)
    cli_evaluate()
