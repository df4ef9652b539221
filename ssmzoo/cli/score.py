"""`ssmzoo score RUN_OR_NAME TEXT ...`: log-likelihood of texts, token by token."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ssmzoo.cli.predict import subject_of


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "score",
        help="log-likelihood of texts under a language model",
        description="Log-likelihood (nats) and perplexity of texts; on a terminal tokens are coloured by surprise.",
    )
    parser.add_argument("model", help="run folder, checkpoint, or name of released weights such as mamba_130m")
    parser.add_argument("texts", nargs="*", help="texts, or - for standard input")
    parser.add_argument("--file", action="append", type=Path, default=[], help="a text file; several times")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens read at a time (2048)")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--json", action="store_true", help="tokens and their log-likelihoods as JSON lines")
    parser.add_argument("--device", help="cpu, cuda, ... (cpu)")
    return parser


def run(args) -> None:
    from ssmzoo.inference.score import coloured, score

    texts = [sys.stdin.read() if text == "-" else text for text in args.texts] + [read(file) for file in args.file]
    if not texts:
        raise ValueError("give a text, - for standard input, or --file PATH")
    subject = subject_of(args)
    terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()
    colours = not args.json and (args.colour == "always" or (args.colour == "auto" and terminal))
    for text in texts:
        found = score(subject, text, args.chunk)
        about = {"tokens": len(found.pieces), "log_likelihood": found.total, "perplexity": found.perplexity}
        if args.json:
            print(json.dumps(about | {"pieces": found.pieces, "log_likelihoods": found.log_likelihoods}))
            continue
        if colours:
            show_colours(coloured(found))
        else:
            for piece, value in zip(found.pieces, found.log_likelihoods):
                print(f"{'' if value is None else f'{value:.3f}':>9}  {piece!r}")
        print(f"{about['tokens']} tokens, log-likelihood {found.total:.3f} nats, perplexity {found.perplexity:.3f}")


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error}") from None


def show_colours(text: str) -> None:
    """Print past the filter that keeps control codes off the terminal, colour codes only."""
    before = getattr(sys.stdout, "colours", None)
    if before is not None:
        sys.stdout.colours = True
    try:
        print(text)
    finally:
        if before is not None:
            sys.stdout.colours = before
