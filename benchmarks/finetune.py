"""Does a start from trained weights help? Classes 0 to 4 of the embedded digits first, then 5 to 9 with few images.

    python benchmarks/finetune.py --steps 60 --seeds 3

Trains a small classifier on one half of the classes, then on a few images of the other half: from scratch, all weights
from the first half, a linear probe, and LoRA. Needs no network. Prints top-1 on the held-out images, mean over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

from ssmzoo.checkpoint_files import find_checkpoint, read_manifest
from ssmzoo.cli.train import train

WAYS = {
    "from scratch": [],
    "fine-tuned": ["init_from={first}"],
    "fine-tuned, layer decay 0.75": ["init_from={first}", "optim.layer_decay=0.75"],
    "linear probe": ["init_from={first}", "freeze=all_but_head"],
    "LoRA, rank 4": ["init_from={first}", "lora.rank=4"],
}


def write_halves(folder: Path, few: int) -> tuple[Path, Path]:
    """Folders of pictures: all of the classes 0 to 4; `few` training pictures of each class from 5 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        pictures = digits.images[digits.target == label]
        half, count = ("first", len(pictures) - 40) if label < 5 else ("second", few)
        for i, picture in enumerate(pictures[: count + 40]):
            place = folder / half / ("train" if i < count else "val") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture * 15.9).astype(np.uint8)).save(place / f"{i}.png")
    return folder / "first", folder / "second"


def run(folder: Path, name: str, data: Path, steps: int, seed: int, *words: str) -> Path:
    """A training run; its folder."""
    sys.argv = ["train.py", "model=vim", "data=image_folder", f"data.path={data}", f"seed={seed}", f"name={name}"]
    sys.argv += [f"runs_dir={folder}", f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    sys.argv += [
        "trainer.check_val_every_n_epoch=null",
        "data.batch_size=25",
        "data.image_size=32",
        "data.in_chans=1",
        "data.num_workers=0",
    ]
    sys.argv += ["data.augment={}", "data.crop_pct=1.0", "optim.warmup_steps=5", "optim.lr=0.002", *words]
    with contextlib.redirect_stdout(io.StringIO()):
        train()
    return folder / "vim" / name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of each fine-tuning; four times as many before it")
    parser.add_argument("--few", type=int, default=10, help="training pictures per class of the second half")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    top1: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        first, second = write_halves(Path(temporary), args.few)
        for seed in range(args.seeds):
            start = run(Path(temporary) / "runs", f"first-{seed}", first, 4 * args.steps, seed)
            for i, (way, words) in enumerate(WAYS.items()):
                words = [word.format(first=start) for word in words]
                done = run(Path(temporary) / "runs", f"second-{seed}-{i}", second, args.steps, seed, *words)
                top1[way].append(read_manifest(find_checkpoint(done))["metrics"]["val/top1"])
    print(f"{args.few} pictures per class, {args.steps} steps, {args.seeds} seeds; top-1 on 200 held-out pictures")
    for way, values in top1.items():
        spread = f" +- {100 * stdev(values):.1f}" if len(values) > 1 else ""
        print(f"  {way:<30} {100 * mean(values):.1f} %{spread}")


if __name__ == "__main__":
    main()
