"""Effective receptive fields of all image backbones in one picture: python benchmarks/vision_erf.py [--runs RUN ...]

Without --runs: initial weights (seed 0), embedded photographs of 224 pixels, Swin-T of timm beside them. With --runs:
the weights and validation images of run folders. Prints the table of docs/results/vision.md and draws --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch.nn.functional import adaptive_avg_pool2d

from ssmzoo.checkpoint_files import find_checkpoint
from ssmzoo.cli.probe import load_subject
from ssmzoo.cli.probe_by_name import named_subject
from ssmzoo.probes.figures import canvas
from ssmzoo.probes.receptive_field import receptive_field

NAMES = [
    "spatial_mamba_tiny",
    "vmamba_tiny",
    "res_vmamba_tiny",
    "vim_tiny",
    "shuffle_mamba_tiny",
    "adventurer_tiny",
    "timm/swin_tiny_patch4_window7_224",
    "timm/convnext_tiny",
]
PIXELS = 56  # sides of the drawn fields: every picture stays small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    options = argparse.Namespace(
        batch=given.batch,
        input=None,
        layers=None,
        channels=None,
        positions=None,
        target=None,
        max_bytes=2**30,
        masks=None,
    )
    columns = 4
    names = given.runs or NAMES
    figure, axes = canvas(-(-len(names) // columns), columns, (1.9, 1.9))
    print("| model | 50 % | 75 % | 95 % | 99 % |\n|---|---|---|---|---|")
    for name, axis in zip(names, axes.flat):
        subject = load_subject(find_checkpoint(str(name)), options) if given.runs else named_subject(name, options)
        title = name.parent.name if given.runs else name.removeprefix("timm/").split("_patch")[0]
        field = receptive_field(subject.model, subject.inputs)
        print(f"| {title} | " + " | ".join(f"{side:.2f}" for side in field.shares.values()) + " |", flush=True)
        side = min(PIXELS, *field.map.shape)
        small = adaptive_avg_pool2d(field.map[None], side)[0]
        drawn = axis.imshow((small / small.max() + 1e-6).log10(), cmap="cividis", vmin=-6, vmax=0, extent=(0, 1, 1, 0))
        axis.set(xticks=[0, 1], yticks=[0, 1])
        axis.set_title(title, fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="log10 |gradient|, largest = 0")
    figure.supxlabel("x and y as shares of the image's side", fontsize=8)
    figure.savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
