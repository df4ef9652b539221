"""Does a start from trained weights help? Trains on one half of the embedded data, then on the other; without network.

    python benchmarks/finetune.py [--only text|digits] [--seeds 3] [--out docs/results]

Text: the modules of Python's standard library in alphabetical order, the first half of the files, then the second.
Digits: classes 0 to 4 of the embedded digits, then 5 to 9 with ten pictures per class. Each second half is trained from
scratch and, from the weights of the first, in the ways of docs/finetuning.md. Writes finetune.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

from ssmzoo.checkpoint_files import find_checkpoint, read_manifest
from ssmzoo.cli.train import train

OTHERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # as in data=text
TEXT = [
    *("model=mamba", "model.d_model=64", "model.n_layer=2", "data.batch_size=8", "data.val_tokens=32768"),
    "optim.warmup_steps=20",
]
TEXT_WAYS = {  # what is typed; {first}: the run on the first half
    "not trained on the second half": ["init_from={first}", "optim.lr=0", "optim.weight_decay=0"],
    "from scratch": [],
    "fine-tuned, the rate from scratch": ["init_from={first}"],
    "fine-tuned, a third of it": ["init_from={first}", "optim.lr={third}"],
    "fine-tuned, a tenth of it": ["init_from={first}", "optim.lr={tenth}"],
    "LoRA, rank 8": ["init_from={first}", "lora.rank=8"],
}
TEXT_RATE = 3e-3
DIGITS = [
    *("model=vim", "data=image_folder", "data.batch_size=25", "data.image_size=32", "data.in_chans=1"),
    *("data.num_workers=0", "data.augment={}", "data.crop_pct=1.0", "optim.warmup_steps=5"),
]
DIGITS_WAYS = {
    "from scratch": [],
    "fine-tuned": ["init_from={first}"],
    "fine-tuned, layer decay 0.75": ["init_from={first}", "optim.layer_decay=0.75"],
    "linear probe": ["init_from={first}", "freeze=all_but_head"],
    "LoRA, rank 4": ["init_from={first}", "lora.rank=4"],
}
DIGITS_RATE = 2e-3
FEW = 10  # training pictures per class of the second half


def text_halves(folder: Path) -> tuple[Path, Path]:
    """Folders of copies of the standard library's modules: the first half of the files by name, and the second."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file.relative_to(root) for file in root.rglob("*.py"))
    files = [file for file in files if not OTHERS.intersection(file.parts)]
    for half, part in (("first", files[: len(files) // 2]), ("second", files[len(files) // 2 :])):
        for file in part:
            (folder / half / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, folder / half / file)
    return folder / "first", folder / "second"


def digit_halves(folder: Path) -> tuple[Path, Path]:
    """Folders of pictures: all of the classes 0 to 4; a few training pictures of each class from 5 to 9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        pictures = digits.images[digits.target == label]
        half, count = ("first", len(pictures) - 40) if label < 5 else ("second", FEW)
        for i, picture in enumerate(pictures[: count + 40]):
            place = folder / half / ("train" if i < count else "val") / str(label)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((picture * 15.9).astype(np.uint8)).save(place / f"{i}.png")
    return folder / "first", folder / "second"


def run(folder: Path, name: str, data: Path, steps: int, seed: int, words: list[str]) -> Path:
    """A training run; its folder."""
    sys.argv = ["train.py", f"data.path={data}", f"seed={seed}", f"name={name}", f"runs_dir={folder}"]
    sys.argv += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    sys.argv += ["trainer.check_val_every_n_epoch=null", *words]
    sys.argv += [f"data.cache_dir={folder}"] * ("model=mamba" in words)
    with contextlib.redirect_stdout(io.StringIO()):
        train()
    return next(folder.glob(f"*/{name}"))


def compare(kind: str, steps: int, seeds: int, folder: Path) -> dict[str, list[float]]:
    """{way: the measure after training on the second half, for every seed}."""
    text = kind == "text"
    halves, base, ways, rate = (
        (text_halves, TEXT, TEXT_WAYS, TEXT_RATE) if text else (digit_halves, DIGITS, DIGITS_WAYS, DIGITS_RATE)
    )
    first, second = halves(folder / kind)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for seed in range(seeds):
        start = run(folder / "runs", f"{kind}-first-{seed}", first, 4 * steps, seed, [*base, f"optim.lr={rate}"])
        for i, (way, words) in enumerate(ways.items()):
            typed = [word.format(first=start, third=rate / 3, tenth=rate / 10) for word in words]
            typed = [f"optim.lr={rate}"] * (not any("optim.lr" in word for word in typed)) + typed
            done = run(folder / "runs", f"{kind}-second-{seed}-{i}", second, steps, seed, [*base, *typed])
            found[way].append(read_manifest(find_checkpoint(done))["metrics"]["val/loss" if text else "val/top1"])
            print(f"{kind}, seed {seed}, {way}: {found[way][-1]:.4f}", flush=True)
    return found


def table(kind: str, steps: int, found: dict[str, list[float]]) -> str:
    """Markdown."""
    text = kind == "text"
    measure = "nats per byte on held-out files" if text else "top-1 in % on 200 held-out pictures"
    what = (
        f"Mamba (64 wide, 2 layers), {4 * steps} steps of 2,048 bytes on the first half of the modules, then {steps} "
        f"on the second, peak rate {TEXT_RATE} from scratch"
        if text
        else f"A small Vim, {4 * steps} steps on the digits 0 to 4, then {steps} on 5 to 9, {FEW} pictures per class"
    )
    lines = [f"## {kind.capitalize()}", "", f"{what}.", "", f"| second half | {measure} |", "|---|---|"]
    scale, digits = (1, 3) if text else (100, 1)
    for way, values in found.items():
        spread = f" +- {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
        lines.append(f"| {way} | {scale * mean(values):.{digits}f}{spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("text", "digits"))
    parser.add_argument("--steps", type=int, default=100, help="on the second half; four times as many on the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for finetune.md; without it the tables are printed")
    args, began, typed = parser.parse_args(), time.monotonic(), " ".join(sys.argv[1:])
    tables = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in [args.only] if args.only else ("text", "digits"):
            tables.append(table(kind, args.steps, compare(kind, args.steps, args.seeds, Path(folder))))
    minutes = (time.monotonic() - began) / 60
    head = f"`python benchmarks/finetune.py {typed}`".replace(" `", "`")
    head += f"; mean +- standard deviation over {args.seeds} seeds; {minutes:.0f} minutes"
    page = "\n\n".join(["# Fine-tuning against training from scratch", head, *tables]) + "\n"
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "finetune.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
