"""Run every probe on a language model, an image model and SD-SSM, where it applies; figures of docs/probes.md.

    make probes, or: python notebooks/run_probes.py [--only relevance recall] [--out runs/probes]

Results: OUT/PROBE/MODEL/summary.md with its tables and figures; chosen figures go to docs/figures as well.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ssmzoo.cli.main import build_parser

HERE = Path(__file__).resolve().parent
APPLY = {  # probe: {shipped checkpoint: its options}
    "hidden_attention": {"language": ["--batch", "16"], "image": ["--batch", "64", "--masks", "otsu"], "sd_ssm_D4": []},
    "relevance": {"language": ["--batch", "16"], "image": ["--batch", "64", "--masks", "otsu"], "sd_ssm_D4": []},
    "token_dynamics": {"language": ["--batch", "16"], "image": ["--batch", "64"]},
    "memory": {"language": ["--batch", "16"], "image": ["--batch", "16"], "sd_ssm_D4": []},
    "recall": {"language": []},
    "generalization_bound": {"language": [], "image": []},
    "polynomial": {"language": [], "image": [], "sd_ssm_D4": []},
    "dsf": {"language": [], "image": [], "sd_ssm_D4": []},
    "receptive_field": {"image": ["--batch", "64"]},
    "local_attribution": {"restoration": []},
    "routing": {"experts": ["--batch", "16"]},
    "expressivity": {"sd_ssm_D4": [], "mamba_D4": []},
}
FIGURES = {  # docs/figures/probe_NAME.png: (probe, checkpoint, figure)
    "hidden_attention": ("hidden_attention", "language", "channels"),
    "explanations": ("hidden_attention", "image", "explanations"),
    "perturbation": ("relevance", "image", "perturbation"),
    "relevance": ("relevance", "image", "scores"),
    "deletion": ("relevance", "image", "deletion"),
    "token_dynamics": ("token_dynamics", "language", "token_dynamics"),
    "memory": ("memory", "language", "memory"),
    "recall": ("recall", "language", "recall"),
    "generalization_bound": ("generalization_bound", "language", "bound"),
    "polynomial": ("polynomial", "language", "polynomial"),
    "dsf": ("dsf", "language", "dsf"),
    "receptive_field": ("receptive_field", "image", "receptive_field"),
    "local_attribution": ("local_attribution", "restoration", "local_attribution"),
    "routing": ("routing", "experts", "routing"),
    "expressivity": ("expressivity", "sd_ssm_D4", "transitions"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=APPLY, default=list(APPLY))
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs" / "probes")
    parser.add_argument("--figures", type=Path, default=HERE.parent / "docs" / "figures")
    args = parser.parse_args()
    for name in args.only:
        for checkpoint, options in APPLY[name].items():
            words = ["probe", name, f"notebooks/checkpoints/{checkpoint}", *options]
            print(f"\n$ ssmzoo {' '.join(words)}", flush=True)
            words[2] = str(HERE / "checkpoints" / checkpoint)
            found = build_parser().parse_args([*words, "--out", str(args.out / name / checkpoint)])
            found.run(found)
    args.figures.mkdir(parents=True, exist_ok=True)
    for figure, (name, checkpoint, file) in FIGURES.items():
        if name in args.only:
            shutil.copyfile(args.out / name / checkpoint / f"{file}.png", args.figures / f"probe_{figure}.png")


if __name__ == "__main__":
    main()
