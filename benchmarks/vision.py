"""Image models in figures: python benchmarks/vision.py size | speed [--sizes 224 512] [--batch 4] [--train]

size   parameters and operations of the published sizes, beside the papers' figures
speed  images per second of processor time on this machine beside timm's swin_tiny, convnext_tiny and mambaout_tiny
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import ssmzoo.timm
from ssmzoo.presets import build_model
from ssmzoo.probes.flops import count_operations, giga

PAPER = {  # parameters and 10^9 operations at 224 pixels (None: not published)
    "spatial_mamba_tiny": (26_748_862, 4.5),
    "spatial_mamba_small": (43_074_280, 7.1),
    "spatial_mamba_base": (95_745_592, 15.8),
    "vmamba_tiny": (30_249_064, 4.9),
    "vmamba_small": (50_147_752, 8.7),
    "vmamba_base": (88_557_800, 15.4),
    "vmamba_vanilla_tiny": (22_893_448, 5.6),
    "vmamba_vanilla_small": (44_417_416, 11.2),
    "vmamba_vanilla_base": (76_254_056, 18.0),
    "vim_tiny": (7_148_008, None),
    "vim_small": (25_796_584, None),
    "vim_base": (97_598_440, None),
    "shuffle_mamba_base": (97_598_440, None),
    "shuffle_mamba_reg_base": (99_301_096, None),
    "adventurer_tiny": (11_608_840, None),
    "adventurer_small": (44_491_816, None),
    "adventurer_base": (98_657_608, None),
}
COMPARED = ["spatial_mamba_tiny", "vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny", "mambaout_tiny"]


def size() -> None:
    print("| model | parameters | published | 10^9 operations at 224 px | published |\n|---|---|---|---|---|")
    for name, (parameters, operations) in PAPER.items():
        cls, arguments = ssmzoo.timm.arguments_of(name)
        with torch.device("meta"):
            model = build_model({"_target_": f"{cls.__module__}.{cls.__name__}", **arguments})
        count = sum(p.numel() for p in model.parameters())
        found = giga(count_operations(model, 1, 3, 224, 224))
        print(f"| {name} | {count:,} | {parameters:,} | {found:.2f} | {operations or ''} |", flush=True)


def speed(names: list[str], sizes: list[int], batch: int, train: bool, repeats: int, drop_path: float | None) -> None:
    """Images per second of processor time: models alternate, median of `repeats` calls after one warm-up each.

    drop_path  rate of stochastic depth, None: each model's own; what is dropped costs ours nothing
    """
    import timm

    depth = {} if drop_path is None else {"drop_path_rate": drop_path}
    what = ", ".join(
        [
            "training" if train else "inference",
            *(f"{k} {v}" for k, v in depth.items()),
            f"batch {batch}",
            f"{torch.get_num_threads()} thread(s)",
        ]
    )
    print(
        f"| images per CPU second ({what}) | "
        + " | ".join(f"{s} px" for s in sizes)
        + " |\n|---"
        + "|---" * len(sizes)
        + "|"
    )
    rates: dict[str, list[float]] = {name: [] for name in names}
    for side in sizes:
        extra = {name: depth | ({"img_size": side} if name.startswith("swin") else {}) for name in names}
        models = {name: timm.create_model(name, **extra[name]).train(train) for name in names}
        x, times = torch.randn(batch, 3, side, side), {name: [] for name in names}
        for _ in range(repeats + 1):
            for name, model in models.items():
                started = time.process_time()
                with torch.set_grad_enabled(train):
                    y = model(x)
                if train:
                    y.sum().backward()
                    model.zero_grad()
                times[name].append(time.process_time() - started)
        for name in names:
            rates[name].append(batch / statistics.median(times[name][1:]))
    for name in names:
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in rates[name]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("size", "speed"))
    parser.add_argument("--models", nargs="+", default=COMPARED)
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--drop-path", type=float, help="rate of stochastic depth, each model's own by default")
    arguments = parser.parse_args()
    if arguments.what == "size":
        size()
    else:
        speed(
            arguments.models, arguments.sizes, arguments.batch, arguments.train, arguments.repeats, arguments.drop_path
        )


if __name__ == "__main__":
    main()
