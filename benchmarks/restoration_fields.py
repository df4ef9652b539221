"""What restoration models look at: python benchmarks/restoration_fields.py [--budget MINUTES]

MambaIR, SwinIR and EDSR (convolutions alone) of 73,000 to 74,300 parameters, x2, 100 steps of the default recipe, three
seeds each; then the effective receptive field and the local attribution map of the middle of four photographs' pieces
of 64 pixels. Claim of MambaIR (arXiv 2402.15648): its field covers the whole picture, and more pixels take part than in
SwinIR or a convolutional network. Writes docs/results/restoration_fields.{json,md,png}; what is finished is kept.
"""

from __future__ import annotations

import argparse
import statistics
from argparse import Namespace
from pathlib import Path

from claim_runs import fill, rows_of, train_once

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = ROOT / "docs" / "results" / "restoration_fields.json"
SEEDS, STEPS, PIXELS = (0, 1, 2), 100, 64
ARMS = {"MambaIR": ("model=mambair",), "SwinIR": ("model=swinir",), "EDSR": ("model=edsr", "model.embed_dim=33")}


def train(arm: str, seed: int, runs: Path) -> dict | None:
    words = [*ARMS[arm], f"seed={seed}", f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}"]
    words += ["data.num_workers=0", "trainer.accelerator=cpu"]
    return train_once(words, runs, f"{arm.lower()}-{seed}", measure)


def measure(run: Path) -> dict:
    from torch.nn import functional as F

    from ssmzoo.checkpoint_files import find_checkpoint
    from ssmzoo.cli.probe_by_name import pictures
    from ssmzoo.probes.local_attribution import local_attribution
    from ssmzoo.probes.receptive_field import receptive_field
    from ssmzoo.train.logger import read_metrics
    from ssmzoo.zoo import load_model

    model = load_model(find_checkpoint(run))[0].eval()
    images = pictures(Namespace(input=None, batch=4), restores=True)
    field, lam = receptive_field(model, images), local_attribution(model, images)
    psnr = [r["val/psnr"] for r in read_metrics(run / "metrics.csv") if "val/psnr" in r][-1]
    found = {"psnr": psnr, "diffusion": lam.diffusion}
    for name, probed in (("field", field), ("lam", lam)):
        found[name] = {str(k): v for k, v in probed.shares.items()}
        small = F.max_pool2d((probed.map + 1e-6).log10()[None], 2)[0]  # half the side, for the picture
        found[f"{name}_map"] = [[round(v, 1) for v in row] for row in small.tolist()]
        found[f"{name}_reached"] = 100 * float((probed.map > 1e-5).double().mean())  # % of the pixels
    return found


def told(rows: list[dict], read, form: str = ".2f") -> str:
    values = [read(row) for row in rows]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form}}"


def draw(arms: dict[str, list[dict]], path: Path) -> None:
    import torch

    from ssmzoo.probes.figures import canvas

    figure, axes = canvas(2, len(arms), (2.3, 2.2))
    for column, (arm, rows) in enumerate(arms.items()):
        for row, (key, title) in enumerate((("field_map", "receptive field"), ("lam_map", "local attribution"))):
            mean = torch.tensor([r[key] for r in rows]).mean(0)
            drawn = axes[row, column].imshow(mean, cmap="cividis", vmin=-6, vmax=0)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].set_title(f"{arm}, {title}", fontsize=8)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="log10, largest = 0")
    figure.savefig(path, dpi=110)


def write_page(rows: list[dict], folder: Path) -> None:
    arms = {arm: [r for r in rows if r["arm"] == arm] for arm in ARMS}
    arms = {arm: found for arm, found in arms.items() if found}
    if not arms:
        print("nothing is measured yet")
        return
    draw(arms, folder / "restoration_fields.png")
    lines = [
        "# What restoration models look at",
        "",
        f"`python benchmarks/restoration_fields.py`, resumable. x2, {STEPS} steps of the default recipe, four",
        f"photographs' pieces of {PIXELS} pixels; mean and standard deviation over the seeds (in brackets). *Reached*:",
        "share of pixels with more than 1e-5 of the largest value; *side*: of the centred square with 95 % of",
        "the whole, over the picture's; *diffusion index*: larger where more pixels take part in the details of the",
        "middle 8 x 8. `ssmzoo probe erf MODEL` and `ssmzoo probe local_attribution MODEL` show any restoration model.",
        "",
        "| model | PSNR, dB | field: reached, % | side | attribution: reached, % | side | diffusion index |",
        "|---" * 7 + "|",
    ]
    for arm, found in arms.items():
        lines.append(
            f"| {arm} ({len(found)}) | {told(found, lambda r: r['psnr'])} | "
            f"{told(found, lambda r: r['field_reached'], '.1f')} | {told(found, lambda r: r['field']['95'])} | "
            f"{told(found, lambda r: r['lam_reached'], '.1f')} | {told(found, lambda r: r['lam']['95'])} | "
            f"{told(found, lambda r: r['diffusion'])} |"
        )
    if len(arms) == len(ARMS):
        lines += ["", "Published (MambaIR, figures 1 and 5): the field covers the whole picture.", ""]
        for read, what in (
            (lambda r: r["field_reached"], "Its field is the widest"),
            (lambda r: r["diffusion"], "Most pixels take part in it"),
        ):
            means = {a: statistics.mean(map(read, found)) for a, found in arms.items()}
            off = {a: statistics.stdev(map(read, f)) if len(f) > 1 else 0.0 for a, f in arms.items()}
            first = "MambaIR"
            clear = all(means[first] - means[a] > off[first] + off[a] for a in arms if a != first)
            ahead = max(means, key=means.get)
            beyond = means[ahead] - means[first] > off[first] + off[ahead]
            verdict = "holds" if clear else "does not hold" if beyond else "is undecided"
            figures = ", ".join(f"{a} {v:.3g}" for a, v in means.items())
            lines.append(f"- **{what}** {verdict} here: {figures}.")
    lines += ["", "![fields and attributions](restoration_fields.png)"]
    (folder / "restoration_fields.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "restoration_fields")
    parser.add_argument("--page-only", action="store_true")
    arguments = parser.parse_args()
    if not arguments.page_only:
        keys = [(arm, seed) for seed in SEEDS for arm in ARMS]
        fill(SUMMARY, arguments.runs.resolve(), keys, train, arguments.budget)
    write_page(rows_of(SUMMARY), SUMMARY.parent)


if __name__ == "__main__":
    main()
