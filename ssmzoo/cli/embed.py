"""`ssmzoo embed RUN_OR_NAME INPUT ... -o FILE`: features of pictures or texts as a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmzoo.cli.predict import check_out, pictures, subject_of


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "embed",
        help="features of pictures or texts as .npz or .parquet",
        description="What goes into the model's head: pooled features of pictures, hidden states of texts.",
    )
    parser.add_argument("model", help="run folder, checkpoint, or name of released weights")
    parser.add_argument("inputs", nargs="+", help="pictures, folders or - (names of files); of a language model: texts")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file ending in .npz or .parquet")
    parser.add_argument("--pool", default="mean", help="mean over the tokens of a text, or its last (mean)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at a time (32)")
    parser.add_argument("--device", help="cpu, cuda, ... (cpu)")
    return parser


def run(args) -> int:
    from ssmzoo.inference.embed import embed_pictures, embed_texts, write_features

    check_out(args.out, (".npz", ".parquet"))
    subject, failed = subject_of(args), []
    if subject.tokenizer is not None:
        names, features = embed_texts(subject, args.inputs, args.pool)
    else:
        names, features = embed_pictures(subject, pictures(args.inputs), args.batch, failed.append)
    for error in failed:
        print(f"error: {error}", file=sys.stderr)
    if len(names):
        write_features(args.out, names, features)
        print(f"{features.shape[0]} x {features.shape[1]} features in {args.out}")
    return 1 if failed else 0
