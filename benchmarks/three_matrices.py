"""Linear attention, Mamba and Spatial-Mamba as matrices from one image: python benchmarks/three_matrices.py --run RUN

    linear attention   alpha[i, j] = C_i delta_j B_j                            j <= i: all that came before, alike
    Mamba              alpha[i, j] = C_i exp(A sum of delta) delta_j B_j        j <= i: what came before, decaying
    Spatial-Mamba      the rows of the second fused over neighbours on the map, before C is read

All three are made of the same layer's A, B, C and delta on the same image, so that they differ in the operator alone
(Spatial-Mamba, arXiv 2410.15091, draws them side by side). RUN is a trained `model=spatial_mamba`. Prints a table: the
share of |weight| on later tokens, mean distance on the map, and how many tokens hold 90 %; draws --out.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ssmzoo.checkpoint_files import find_checkpoint
from ssmzoo.cli.probe import load_subject
from ssmzoo.probes.attention_matrices import attention
from ssmzoo.probes.figures import canvas, picture
from ssmzoo.probes.scan import Scan
from ssmzoo.probes.tap import tap


def matrices(scan: Scan) -> dict[str, Tensor]:
    """Mean |alpha| over channels (l l), by tokens."""
    plain = replace(scan, fusion=None)
    forms = {"linear attention": replace(plain, A=torch.zeros_like(scan.A)), "Mamba": plain, "Spatial-Mamba": scan}
    return {name: attention(form)[0].abs().mean(0) for name, form in forms.items()}


def figures_of(matrix: Tensor, size: tuple[int, int]) -> tuple[float, float, float]:
    """(share on later tokens in %, mean distance on the map, tokens that hold 90 %), means over tokens."""
    weights = matrix / matrix.sum(1, keepdim=True).clamp(min=1e-12)
    y, x = (torch.arange(size[0] * size[1]) // size[1], torch.arange(size[0] * size[1]) % size[1])
    distance = ((y[:, None] - y) ** 2 + (x[:, None] - x) ** 2).sqrt()
    ordered = weights.sort(1, descending=True).values.cumsum(1)
    return (
        100 * float(weights.triu(1).sum(1).mean()),
        float((weights * distance).sum(1).mean()),
        float((ordered < 0.9).sum(1).double().mean() + 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=1, help="which scan, by depth")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    options = dict.fromkeys(("input", "layers", "channels", "positions", "target", "masks"))
    subject = load_subject(find_checkpoint(given.run), Namespace(batch=1, length=1, max_bytes=2**30, **options))
    with tap(subject.model, layers=[given.layer]) as scans, torch.no_grad():
        subject.model(subject.inputs)
    scan = next(s for s in scans if s.fusion is not None)
    found, size = matrices(scan), scan.fusion.size
    middle = size[0] // 2 * size[1] + size[1] // 2
    print("| | weight on later tokens, % | mean distance, tokens | tokens that hold 90 % |\n|---|---|---|---|")
    figure, axes = canvas(2, 4, (2.3, 2.3))
    axes[0, 0].imshow(picture(subject.inputs[0]))
    axes[0, 0].set_title("image", fontsize=8)
    axes[1, 0].axis("off")
    for column, (name, matrix) in enumerate(found.items(), start=1):
        print(f"| {name} | " + " | ".join(f"{v:.1f}" for v in figures_of(matrix, size)) + " |")
        rows = matrix / matrix.amax(1, keepdim=True).clamp(min=1e-12)
        axes[0, column].imshow(rows, cmap="cividis")
        axes[0, column].set_title(name, fontsize=8)
        axes[1, column].imshow(rows[middle].unflatten(0, size), cmap="cividis")
        axes[1, column].set_title("what the middle token reads", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(given.out, dpi=110)
    print(given.out)


if __name__ == "__main__":
    main()
