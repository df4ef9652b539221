"""Fill docs/results/ssmi.md: SSMI beside LoRA and beside no pictures, on questions about digits.

    python benchmarks/ssmi.py --budget 10               what is missing, for so many minutes; then the page
    python benchmarks/ssmi.py --arms "SSMI;SSMI without pictures"
    python benchmarks/ssmi.py --page-only

A run is train.py in a process of its own, on one thread, with seeds 0, 1 and 2; all arms of a seed have the same frozen
decoder, which the first of them trains. What is done is one line of results.jsonl under --runs and is not
repeated, nor is what stands in docs/results/ssmi.json, their summary.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from claim_runs import fill, rows_of, train_once

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "docs/results/ssmi.json"
SEEDS = (0, 1, 2)
UNSEEN = "data.unseen=[large]"
ARMS = {  # name: arguments; the first of them trains the decoder of a seed
    "SSMI": (),
    "SSMI, constant A, B, C, D as the paper writes them": ("model.selective=false",),
    "SSMI, mean of the visual tokens added": ("model.inject=add",),
    "SSMI, one memory for all layers": ("model.share=true",),
    "SSMI without the alignment stage": ("task.align_steps=0",),
    "LoRA (peft), visual tokens in front": ("model.adapter=lora",),
    "SSMI without pictures": ("model.inject=none",),
    "SSMI, the third question never asked in training": (UNSEEN,),
    "LoRA, the third question never asked in training": ("model.adapter=lora", UNSEEN),
}
KINDS = {"digit": "which digit", "even": "even", "large": "larger than four"}


def trained(folder: Path) -> dict:
    """The validation of the best checkpoint, and the numbers of parameters."""
    from ssmzoo.train.logger import read_metrics
    from ssmzoo.zoo import load_model

    rows = [r for r in read_metrics(folder / "metrics.csv") if "val/accuracy" in r]
    best = max(rows, key=lambda r: r["val/accuracy"])
    model, _ = load_model(folder)
    some, total = model.trainable()
    found = {k.removeprefix("val/"): round(v, 5) for k, v in best.items() if k.startswith("val/accuracy")}
    return found | {"step": int(best["step"]), "trained": some, "parameters": total}


def keep_decoder(folder: Path, file: Path) -> None:
    import torch

    from ssmzoo.zoo import load_model

    torch.save(load_model(folder)[0].reader.backbone.state_dict(), file)


def train(arm: str, seed: int, runs: Path) -> dict | None:
    decoder = runs / f"decoder-{seed}.pt"
    words = ["model=ssmi", *ARMS[arm], f"seed={seed}", "trainer.accelerator=cpu", "callbacks.watchdog=null"]
    words += [f"init_from={decoder}", "task.decoder_steps=0"] if decoder.exists() else []
    keep = None if decoder.exists() else lambda folder: keep_decoder(folder, decoder)
    return train_once(words, runs, f"{list(ARMS).index(arm)}-{seed}", trained, keep)


def spread(values: list[float]) -> str:
    low, high = 100 * min(values), 100 * max(values)
    if len(values) == 1:
        return f"{low:.1f} (one seed)"
    return f"{100 * statistics.mean(values):.1f} ({low:.1f} to {high:.1f})"


def write_page(rows: list[dict]) -> None:
    lines = [
        "# Questions about digits: SSMI, LoRA, no pictures",
        "",
        "`python benchmarks/ssmi.py`, one thread a run. The default run of `model=ssmi` (400 steps of 64 questions,",
        "learning rate 1e-2 for all, chosen for SSMI), best validation; the arms of a seed share one frozen decoder.",
        "Percent of answers about 359 held-out digits that are right in every byte; mean and range over seeds. All",
        "numbers are of our design: the paper's backbones and tables were not at hand.",
        "",
        "| arm | all | " + " | ".join(KINDS.values()) + " | trained parameters | seeds |",
        "|" + "---|" * (len(KINDS) + 4),
    ]
    for arm in ARMS:
        if runs := [r for r in rows if r["arm"] == arm]:
            cells = [spread([r[key] for r in runs]) for key in ("accuracy", *(f"accuracy_{k}" for k in KINDS))]
            share = f"{runs[0]['trained']:,} ({100 * runs[0]['trained'] / runs[0]['parameters']:.1f} %)"
            lines.append(f"| {arm} | " + " | ".join(cells) + f" | {share} | {len(runs)} |")
    SUMMARY.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default=";".join(ARMS), help="some of them, separated by ;")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; no run starts after them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims_ssmi")
    parser.add_argument("--page-only", action="store_true", help="from docs/results/ssmi.json")
    arguments = parser.parse_args()
    names = arguments.arms.split(";")
    if unknown := [n for n in names if n not in ARMS]:
        parser.error(f"unknown arm {unknown[0]!r}; choose from {'; '.join(ARMS)}")
    if not arguments.page_only:
        keys = [(arm, seed) for seed in map(int, arguments.seeds.split(",")) for arm in names]
        fill(SUMMARY, arguments.runs.resolve(), keys, train, arguments.budget)
    write_page(rows_of(SUMMARY))
    print(f"written: {SUMMARY.with_suffix('.md')}")


if __name__ == "__main__":
    main()
