"""`ssmzoo generate RUN_OR_NAME --prompt ...`: continue text with a trained language model."""

from __future__ import annotations

import argparse
import sys
from itertools import chain, islice


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "generate",
        help="continue a text with a trained language model",
        description="Continue one or more prompts. The text of the first streams as it is "
        "drawn; the others, continued in the same batch, follow at the end.",
    )
    add = parser.add_argument
    add("checkpoint", help="run folder, checkpoint, released folder, or name of released weights")
    add("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be given several times")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="tokens to add (default 256)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy, 1 the model's own (default 0.8)")
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens only")
    add("--top-p", type=float, metavar="P", help="draw from the fewest tokens whose probabilities reach P")
    add("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the most likely")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: tokens already seen are rarer")
    add("--seed", type=int, metavar="S", help="the same seed draws the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help="end where this text comes up; several times")
    add("--ignore-eos", action="store_true", help="go on after the tokenizer's end-of-text token")
    add(
        "--read-twice",
        action="store_true",
        help="show the model each prompt twice, a newline between (JRT-Prompt): what it could not keep the first time "
        "it may know to keep the second",
    )
    add(
        "--bidirectional",
        action=argparse.BooleanOptionalAction,
        help="read the prompts in both directions, with models that can (default: as the model was trained)",
    )
    add("--prefill-chunk", type=int, metavar="L", help="read the prompts in pieces of L tokens to save memory")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps")
    return parser


def run(args: argparse.Namespace) -> int:
    from ssmzoo.inference.generate import FINISHED, stream
    from ssmzoo.inference.subject import load_subject

    subject = load_subject(args.checkpoint)
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{args.checkpoint} holds {subject.manifest.get('model', 'a model')} without a tokenizer, so it is no "
            f"language model that text can be generated with; give a run of data=text or data=hf_text, or put the "
            f"tokenizer.json of a released model beside its file"
        )
    prompts = [tokenizer.encode(text) for text in args.prompt]
    for text, ids in zip(args.prompt, prompts):
        if not ids:
            raise ValueError(f"--prompt {text!r} has no token; give at least one character to continue from")
    if args.read_twice:
        between = tokenizer.encode("\n")
        prompts = [[*ids, *between, *ids] for ids in prompts]
    stops = [_stop_text(text) for text in args.stop]
    steps = stream(
        subject.model.to(_device(args.device)),
        prompts,
        args.max_new_tokens,
        prefill_chunk=args.prefill_chunk,
        bidirectional=_trained_both_ways(subject.manifest) if args.bidirectional is None else args.bidirectional,
        stop_tokens=set() if args.ignore_eos or tokenizer.end_token is None else {tokenizer.end_token},
        vocab_size=tokenizer.vocab_size,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        greedy=args.greedy,
        seed=args.seed,
    )
    texts = [_Continuation(tokenizer.decoder(), stops) for _ in prompts]
    out = _Out()
    first = list(islice(steps, 1))  # errors come before any text
    out.write((_heading(0) if len(prompts) > 1 else "") + args.prompt[0])
    for tokens in chain(first, steps):
        for i, token in enumerate(tokens.tolist()):
            new = texts[i].push(token) if token != FINISHED else ""
            if i == 0:
                out.write(new)
        if all(text.stopped for text in texts):
            break
    out.write(texts[0].flush() + "\n")
    for i in range(1, len(prompts)):
        texts[i].flush()
        out.write(f"\n{_heading(i)}{args.prompt[i]}{texts[i].text}\n")
    return 0


class _Continuation:
    """The text of one sequence up to the first stop text, which may span tokens; what may begin one is held back."""

    def __init__(self, decoder, stops: list[str]):
        self.decoder, self.stops = decoder, stops
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        return "" if self.stopped else self._take(self.decoder.push([token]), whole=False)

    def flush(self) -> str:
        return "" if self.stopped else self._take(self.decoder.flush(), whole=True)

    def _take(self, new: str, whole: bool) -> str:
        """Text that is certain by now."""
        pending = self.held + new
        at = min((found for stop in self.stops if (found := pending.find(stop)) >= 0), default=-1)
        self.stopped = at >= 0
        cut = at if self.stopped else len(pending) if whole else self._certain(pending)
        self.held = pending[cut:]
        self.text += pending[:cut]
        return pending[:cut]

    def _certain(self, pending: str) -> int:
        """How much of `pending` cannot be part of a stop text that is still to be completed."""
        longest = max(map(len, self.stops), default=1) - 1
        starts = range(max(0, len(pending) - longest), len(pending))
        return next((i for i in starts if any(stop.startswith(pending[i:]) for stop in self.stops)), len(pending))


class _Out:
    """Standard output that shows every piece at once and never fails over a character the terminal lacks."""

    def write(self, text: str) -> None:
        encoding = sys.stdout.encoding or "utf-8"
        data = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        sys.stdout.write(data.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def _trained_both_ways(manifest: dict) -> bool:
    """Whether the task of a run was to continue prefixes that are read in both directions."""
    task = (manifest.get("config") or {}).get("task") or {}
    return str(task.get("_target_", "")).endswith(".PrefixLanguageModeling")


def _heading(i: int) -> str:
    return f"--- prompt {i + 1} ---\n"


def _stop_text(text: str) -> str:
    if not text:
        raise ValueError("--stop is empty; give the text to end at, such as '\\n'")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _device(name: str):
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not usable ({str(error).splitlines()[0]}); use auto or cpu") from error
