"""What small patches cost at 224 pixels: python benchmarks/patch_cost.py

A block of Adventurer-T and one of its ViT twin (width 256, 4 heads), patches of 16 to 1 pixels, 196 to 50,176 tokens;
and the whole Adventurer-T of 12 blocks at 50,176 tokens. Forward in inference mode, and one training step (forward,
backward, AdamW) of one image; every measurement is one call in a process of its own on one thread, CPU seconds and the
growth of its resident memory. The whole model trains with its blocks recomputed in the backward pass. Claim
(arXiv 2502.03738): an epoch of DeiT-B costs 2,689 times as much at patch 1 as at patch 16, of Adventurer-B 256 times.
Writes docs/results/patch_cost.{json,md}; what is measured is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from claim_runs import forked

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "patch_cost.json"
PATCHES, SIDE = (16, 8, 4, 2, 1), 224
BLOCKS = {"Adventurer-T, 1 block": "adventurer", "ViT, 1 block": "vit"}
WHOLE = "Adventurer-T, 12 blocks"
KINDS = ("forward", "training step")
CASES = [(WHOLE, 1, kind) for kind in KINDS] + [(arm, p, kind) for p in PATCHES for arm in BLOCKS for kind in KINDS]


def resident() -> int:
    """Bytes now (VmRSS)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def build(arm: str, patch: int):
    from ssmzoo.models.adventurer import Adventurer
    from ssmzoo.models.vit import ViT

    if arm == WHOLE:
        model = Adventurer(img_size=SIDE, patch_size=patch, embed_dim=256, depth=12)
        model.set_grad_checkpointing()
        return model
    if BLOCKS[arm] == "vit":
        return ViT(img_size=SIDE, patch_size=patch, embed_dim=256, depth=1, num_heads=4)
    return Adventurer(img_size=SIDE, patch_size=patch, embed_dim=256, depth=1)


def measure(arm: str, patch: int, kind: str) -> dict:
    import torch

    small = torch.nn.Linear(2, 2)  # what the first step of a process imports is not counted
    small(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(small.parameters()).step()
    torch.manual_seed(0)
    model, before = build(arm, patch), resident()
    x = torch.randn(1, 3, SIDE, SIDE)
    cpu, wall = time.process_time(), time.perf_counter()
    if kind == "forward":
        with torch.inference_mode():
            model.eval()(x)
    else:
        optimizer = torch.optim.AdamW(model.train().parameters())
        model(x).logsumexp(1).sum().backward()
        optimizer.step()
    return {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall, "resident": before}


def write_page(known: dict[str, dict], path: Path) -> None:
    lines = [
        "# What small patches cost",
        "",
        "`python benchmarks/patch_cost.py`: one image of 224 pixels, float32, one thread; CPU seconds and growth of",
        "resident memory of one call, on a machine that others used. The ViT twin has Adventurer-T's width of 256.",
        "Published for an epoch (A100 hours, arXiv 2502.03738): DeiT-B 0.36, 1.86, 9.79, 80.06, 967.99 at patch 16, 8,",
        "4, 2, 1; Adventurer-B 0.45, 1.76, 6.86, 27.45, 115.08.",
        "",
        "| | patch | tokens | forward, CPU s | GiB | training step, CPU s | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in (*BLOCKS, WHOLE):
        for p in PATCHES:
            cells = []
            for kind in KINDS:
                row = known.get(f"{arm}/{p}/{kind}")
                cells += [f"{row['cpu_seconds']:.3g}", f"{row['bytes'] / 2**30:.2f}"] if row else ["", ""]
            if any(cells):
                lines.append(f"| {arm} | {p} | {(SIDE // p) ** 2:,} | {' | '.join(cells)} |")
    grows = {
        arm: known[f"{arm}/1/forward"]["cpu_seconds"] / known[f"{arm}/4/forward"]["cpu_seconds"]
        for arm in BLOCKS
        if f"{arm}/1/forward" in known
    }
    if len(grows) == len(BLOCKS):
        ours, twin = grows.values()
        lines += [
            "",
            f"Sixteen times as many tokens (patch 4 to 1) cost a block of Adventurer {ours:.0f} times as much forward, "
            f"one of ViT {twin:.0f} times (published, whole training: 17 and 99 times): the claim "
            f"{'holds' if ours < twin / 2 else 'does not hold'} here.",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for arm, p, kind in () if arguments.page_only else CASES:
        key = f"{arm}/{p}/{kind}"
        if key in known:
            continue
        import torch

        torch.set_num_threads(1)
        kept = RESULTS.with_name(".patch_cost.json")
        status, _, largest = forked(lambda: measure(arm, p, kind), kept)  # noqa: B023
        if status:
            print(f"{key}: failed", flush=True)
            continue
        row = json.loads(kept.read_text())
        kept.unlink()
        known[key] = row | {"bytes": largest - row.pop("resident")}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        write_page(known, RESULTS.with_suffix(".md"))
        print(f"{key}: {known[key]['cpu_seconds']:.3g} CPU s, {known[key]['bytes'] / 2**30:.2f} GiB", flush=True)
    write_page(known, RESULTS.with_suffix(".md"))


if __name__ == "__main__":
    main()
