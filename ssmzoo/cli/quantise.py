"""`ssmzoo quantise RUN_OR_CHECKPOINT --mode w4a16`: a checkpoint of 4- or 8-bit integers that loads like any other."""

from __future__ import annotations

import argparse
import time


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "quantise",
        help="make a checkpoint of 4- or 8-bit integers",
        description="Quantise a trained model (Quamba, Quamba2): fused norms, Hadamard rotations, sorted and clustered "
        "channels, static scales, GPTQ. The result is a checkpoint for generate, eval.py, probes and transformers.",
    )
    add = parser.add_argument
    add("checkpoint", help="run folder or checkpoint")
    add("--mode", default="w4a16", help="bits of weights and activations: w8a8, w4a8, w4a16 (default) or w8a16")
    add("--out", help="folder to make (default: RUN-MODE beside the run)")
    add(
        "--layer",
        action="append",
        default=[],
        metavar="GLOB=MODE",
        help="another mode for the modules whose names fit, such as '*.layers.0.*=w8a16'; several times",
    )
    add("--nearest", action="store_true", help="round 4-bit weights to the nearest instead of GPTQ")
    add("--no-rotate", action="store_true", help="leave out the rotations (for widths without a Hadamard matrix)")
    add("--no-reorder", action="store_true", help="do not sort and cluster Mamba-2's channels")
    add("--smooth", type=float, metavar="ALPHA", help="SmoothQuant-like scaling, usually 0.5; with --no-rotate")
    add("--untie", action="store_true", help="a table of its own for a head that shares the embedding's")
    add("--no-embedding", action="store_true", help="keep the embedding in float")
    add("--no-head", action="store_true", help="keep the head in float")
    add("--group-size", type=int, default=128, metavar="N", help="inputs that share a scale at 4 bits (128)")
    add("--damping", type=float, default=0.01, metavar="D", help="of GPTQ's Hessian (0.01)")
    add("--percentile", type=float, default=0.9995, metavar="P", help="of |x| at the scan that is represented (0.9995)")
    add(
        "--samples", type=int, default=128, metavar="N", help="samples of the run's training part to calibrate on (128)"
    )
    add("--length", type=int, metavar="L", help="tokens per sample (default: as in training, at most 512)")
    add("--text", metavar="FILE", help="calibrate on this text instead")
    add("--which", choices=("best", "last"), default="best", help="checkpoint of a run folder (best)")
    return parser


def run(args) -> None:
    from ssmzoo.adapt.quantise import Settings
    from ssmzoo.train.quantise import quantise_checkpoint

    settings = Settings(
        mode=args.mode,
        layers=mixture(args.layer),
        method="nearest" if args.nearest else "gptq",
        rotate=not args.no_rotate,
        reorder=not args.no_reorder,
        smooth=args.smooth,
        untie=args.untie,
        embedding=not args.no_embedding,
        head=not args.no_head,
        group_size=args.group_size,
        damping=args.damping,
        percentile=args.percentile,
    )
    start = time.monotonic()
    made = quantise_checkpoint(
        args.checkpoint, args.out, settings, args.samples, args.length, args.text, prefer=args.which
    )
    share = made.after / made.before
    print(f"{made.before:,} -> {made.after:,} bytes of weights ({share:.1%}) in {time.monotonic() - start:.0f} s")
    print(f"written to {made.folder}")


def mixture(entries: list[str]) -> dict[str, str]:
    found = {}
    for entry in entries:
        glob, equals, mode = entry.rpartition("=")
        if not equals or not glob:
            raise ValueError(f"--layer {entry!r} is not GLOB=MODE, such as '*.layers.0.*=w8a16'")
        found[glob] = mode
    return found
