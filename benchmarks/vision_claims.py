"""Two claims about image models, each with and without the part in question: python benchmarks/vision_claims.py

    python benchmarks/vision_claims.py [--claims spatial_mamba layer_shuffle] [--seeds 0 1 2] [--runs DIR] [--out FILE]

Arms of a claim share data, budget and seeds; runs that DIR holds already are not repeated. The last weights of a run
are judged in inference mode on its training images (not augmented) and on its validation images. Prints a Markdown
table; --out replaces the part between the lines "<!-- claims -->" and "<!-- end of claims -->" of a page by it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = {  # experiment: (question, {arm: overrides})
    "spatial_mamba": (
        "Does fusing neighbouring states help Spatial-Mamba?",
        {"with state fusion": [], "without": ["model.mixer.fuse_states=false"]},
    ),
    "layer_shuffle": (
        "Does layer-wise shuffle close the gap between training and validation?",
        {"with layer shuffle": [], "without": ["model.shuffle_rate=0"]},
    ),
}


def train(claim: str, arm: int, overrides: list[str], seed: int, runs: Path) -> Path:
    """The run folder, trained now unless it is finished."""
    name = f"{claim}-{arm}-seed{seed}"
    found = list(runs.glob(f"*/{name}/report.md"))
    if not found:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            f"experiment=claims/{claim}",
            f"seed={seed}",
            f"name={name}",
            f"runs_dir={runs}",
            *overrides,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = list(runs.glob(f"*/{name}/report.md"))
    return found[0].parent


@torch.no_grad()
def judge(run: Path) -> dict[str, float]:
    """Cross entropy (nats) and top-1 on training images without augmentation and on validation images."""
    from omegaconf import OmegaConf

    from ssmzoo.data.images import ImageData, ImageSamples
    from ssmzoo.data.loader import ResumableLoader
    from ssmzoo.zoo import load_model

    model, manifest = load_model(run, prefer="last")
    arguments = OmegaConf.to_container(OmegaConf.create(manifest["config"]), resolve=True)["data"]
    data = ImageData(**{k: v for k, v in arguments.items() if k != "_target_"} | {"augment": None})
    result = {}
    for side, images in zip(("train", "val"), data._open()):
        samples = ImageSamples(images, data._transform(training=False), "L" if data.channels == 1 else "RGB")
        batches = [(model(b["image"]), b["label"]) for b in ResumableLoader(samples, 128)]
        logits, labels = (torch.cat(parts) for parts in zip(*batches))
        result[f"{side}_loss"] = F.cross_entropy(logits, labels).item()
        result[f"{side}_top1"] = (logits.argmax(-1) == labels).float().mean().item()
    return result


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    values = [scale * v for v in values]
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def section(claim: str, seeds: list[int], runs: Path) -> list[str]:
    question, arms = CLAIMS[claim]
    command = f"python train.py experiment=claims/{claim}"
    lines = [
        f"### {question}",
        "",
        f"`{command}`, seeds {', '.join(map(str, seeds))}; mean and standard deviation.",
        "",
        "| | validation top-1 (%) | training top-1 (%) | validation cross entropy | training cross entropy | gap |",
        "|---|---|---|---|---|---|",
    ]
    for number, (arm, overrides) in enumerate(arms.items()):
        found = [judge(train(claim, number, overrides, seed, runs)) for seed in seeds]
        columns = {key: [f[key] for f in found] for key in found[0]}
        gap = [f["val_loss"] - f["train_loss"] for f in found]
        name = f"{arm} (`{' '.join(overrides)}`)" if overrides else arm
        lines.append(
            f"| {name} | {spread(columns['val_top1'], 2, 100)} | {spread(columns['train_top1'], 2, 100)} | "
            f"{spread(columns['val_loss'], 3)} | {spread(columns['train_loss'], 3)} | {spread(gap, 3)} |"
        )
        print(lines[-1], flush=True)
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [line for claim in arguments.claims for line in section(claim, arguments.seeds, arguments.runs)]
    if arguments.out is None:
        print("\n".join(lines))
        return
    before, rest = arguments.out.read_text(encoding="utf-8").split("<!-- claims -->")
    after = rest.split("<!-- end of claims -->")[1]
    body = "\n".join(["<!-- claims -->", "", *lines, "<!-- end of claims -->"])
    arguments.out.write_text(before + body + after, encoding="utf-8")


if __name__ == "__main__":
    main()
