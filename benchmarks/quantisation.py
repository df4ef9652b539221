"""What fewer bits cost: loss, recall, bytes and tokens per second of quantised models, and which step costs the loss.

    python benchmarks/quantisation.py [--runs runs] [--steps 300] [--only train|modes|steps|page] [--out docs/results]

Trains mamba, mamba2 and moe_mamba on the embedded text and mamba2 on multi-query recall (or takes the runs that lie
under --runs by these names; --run TITLE=PATH names others), quantises each as `ssmzoo quantise` does, and writes
quantisation.md, .png and .json. Numbers that stand in the .json are not measured again, so that a run that was cut off
goes on. No network.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from ops import clock
from torch.nn import functional as F

from ssmzoo.adapt.quantise import MODES, Settings
from ssmzoo.checkpoint_files import WEIGHTS, find_checkpoint, read_manifest
from ssmzoo.cli.train import train
from ssmzoo.inference.generate import generate
from ssmzoo.train.config import build_node
from ssmzoo.train.quantise import quantise_checkpoint
from ssmzoo.zoo import load_model

TEXT = ("mamba", "mamba2", "moe_mamba")
RECALL = "mamba2 on recall"
VARIANTS = {  # ablation by step: what is left out
    "all steps": {},
    "nothing (round to nearest)": {"method": "nearest", "rotate": False, "reorder": False},
    "without rotation": {"rotate": False},
    "without reordering": {"reorder": False},
    "without GPTQ": {"method": "nearest"},
    "SmoothQuant-like, no rotation": {"rotate": False, "smooth": 0.5},
    "without embedding and head": {"embedding": False, "head": False},
    "head with a table of its own": {"untie": True},
}
TOKENS, SAMPLES, NEW = 65_536, 64, 48


def run_of(root: Path, title: str) -> Path:
    return root / title.split()[0] / ("recall" if title == RECALL else "default")


def train_missing(root: Path, steps: int) -> None:
    """The default runs with a fixed number of steps, and a small Mamba-2 that learns recall."""
    for title in (*TEXT, RECALL):
        run = run_of(root, title)
        if (run / "checkpoints").is_dir():
            continue
        words = [f"model={title.split()[0]}", f"runs_dir={root}", f"name={run.name}", f"trainer.max_steps={steps}"]
        if title == RECALL:
            words = [*words[:3], "data=mqar", "model.d_model=64", "model.n_layer=2", "optim.lr=1e-2"]
            words += ["model.ssm_cfg={d_state:64,headdim:16}", "trainer.max_steps=1200"]
        print(f"python train.py {' '.join(words)}", flush=True)
        before, sys.argv = sys.argv, ["train.py", *words]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                train()
        finally:
            sys.argv = before


@torch.no_grad()
def loss_of(folder: Path, tokens: int) -> dict[str, float]:
    """Bits per byte and perplexity on the held-out text, or accuracy on fresh recall sequences."""
    model, manifest = load_model(folder)
    node = manifest["config"]["data"]
    if "tokenizer" in manifest:
        node = node | {"tokenizer": manifest["tokenizer"], "val_tokens": tokens}
    data = build_node(node, "ssmzoo.data.")
    data.prepare_data()
    data.setup("validate")
    right = nats = count = 0
    loaders = data.val_dataloader()
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        for batch in loader:
            logits, labels = model(batch["input_ids"]).logits.flatten(0, 1), batch["labels"].flatten()
            nats += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            real = labels >= 0
            right += (logits.argmax(-1)[real] == labels[real]).sum().item()
            count += real.sum().item()
    found = {"loss": nats / count, "accuracy": right / count}
    if hasattr(data, "bytes_per_token"):
        found["bits_per_byte"] = nats / count / math.log(2) / data.bytes_per_token()
    return found


def seconds_per_token(folders: list[Path]) -> list[float]:
    """Of every model decoding one stream, the median of interleaved repeats."""
    models = [load_model(folder)[0] for folder in folders]
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(4):
        for model, own in zip(models, times):
            start = clock()
            generate(model, [[10, 32, 32]], NEW if repeat else 4, greedy=True)
            own.append((clock() - start) / NEW)
    return [sorted(own[1:])[1] for own in times]


def quantised(run: Path, title: str, mode: str, change: dict, work: Path) -> Path:
    """The checkpoint of a variant, made once."""
    out = work / f"{title} {mode} {json.dumps(change, sort_keys=True)}".replace(" ", "_").replace("/", "_")
    if not out.exists():
        quantise_checkpoint(run, out, Settings(mode=mode, **change), samples=SAMPLES)
    return out


def measure(runs: dict[str, Path], root: Path, file: Path, wanted: str) -> None:
    """Fill the json; every entry is written when it is there."""
    found = json.loads(file.read_text()) if file.exists() else {}

    def keep(key: str, make, *args) -> None:
        if key not in found:
            found[key] = make(*args)
            file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(key, found[key], flush=True)

    work = root / "quantised"
    for title, run in runs.items():
        best = find_checkpoint(run)
        keep(f"{title}/float32", as_trained, best)
        if wanted in ("all", "modes"):
            for mode in MODES:
                keep(f"{title}/{mode}", variant, run, title, mode, {}, work)
            if title != RECALL:
                keep(f"{title}/seconds", rates, run, title, work)
        if wanted in ("all", "steps") and title != RECALL:
            for mode in ("w4a16", "w4a8", "w8a8"):
                for name, change in VARIANTS.items():
                    if matters(mode, name, read_manifest(best)["model"]):
                        keep(f"{title}/{mode}/{name}", variant, run, title, mode, change, work)


def as_trained(folder: Path) -> dict[str, float]:
    return loss_of(folder, TOKENS) | size_of(folder) | {"step": read_manifest(folder).get("step")}


def variant(run: Path, title: str, mode: str, change: dict, work: Path) -> dict[str, float]:
    folder = quantised(run, title, mode, change, work)
    return loss_of(folder, TOKENS) | size_of(folder)


def rates(run: Path, title: str, work: Path) -> dict[str, float]:
    folders = [find_checkpoint(run), *(quantised(run, title, mode, {}, work) for mode in MODES)]
    return dict(zip(("float32", *MODES), seconds_per_token(folders)))


def matters(mode: str, name: str, model: str) -> bool:
    """Whether leaving this out changes anything in this mode."""
    if "reordering" in name:
        return model == "mamba2" and mode.endswith("a8")
    return not (mode == "w8a8" and ("GPTQ" in name or "table" in name or "embedding" in name))


def size_of(folder: Path) -> dict[str, int]:
    return {"bytes": (folder / WEIGHTS).stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/quantisation"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", choices=("all", "train", "modes", "steps", "page"), default="all")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--run", action="append", default=[], metavar="TITLE=PATH", help="in place of the default runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {entry.partition("=")[0]: Path(entry.partition("=")[2]) for entry in args.run}
    if args.only in ("all", "train") and not runs:
        train_missing(args.runs, args.steps)
    file = args.out / "quantisation.json"
    if args.only in ("all", "modes", "steps"):
        own = {title: run_of(args.runs, title) for title in (*TEXT, RECALL)}
        runs = runs or {title: run for title, run in own.items() if (run / "checkpoints").is_dir()}
        measure(runs, args.runs, file, args.only)
        shutil.rmtree(args.runs / "quantised", ignore_errors=True)
    if args.only in ("all", "page"):
        import quantisation_page

        quantisation_page.write(json.loads(file.read_text()), args.out)


if __name__ == "__main__":
    main()
