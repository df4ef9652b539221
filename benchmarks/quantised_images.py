"""Do int8 products pay in image models? The share of linear layers in a forward pass, and what w8a8 costs.

    python benchmarks/quantised_images.py [--out docs/results]

VMamba-T and Spatial-Mamba-T at 224 x 224, MambaIR-light x2 at 48 x 48, random weights, one image, one thread: how much
of the time oneDNN's linear layers take, which is all that 8-bit products could make faster; the time of the quantised
model beside it, interleaved; and how far its output is from the float one. Kept in quantisation.json. No network.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import ssmzoo
from ssmzoo.adapt.quantise import quantise

MODELS = (("vmamba_tiny", 224), ("spatial_mamba_tiny", 224), ("mambair_light_x2", 48))
LINEAR = ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm", "aten::bmm")


@torch.no_grad()
def measure(name: str, size: int, repeats: int = 5) -> dict[str, float]:
    torch.manual_seed(0)
    model = ssmzoo.create_model(name).eval()
    x = torch.rand(1, 3, size, size)
    small = quantise(model, [x], mode="w8a8", rotate=False, reorder=False)
    times: dict[str, list[float]] = {"float32": [], "w8a8": []}
    for _ in range(repeats):
        for title, one in (("float32", model), ("w8a8", small)):
            start = time.perf_counter()
            one(x)
            times[title].append(time.perf_counter() - start)
    plain, integers = (sorted(t)[repeats // 2] for t in times.values())
    with profile(
        activities=[ProfilerActivity.CPU]
    ) as seen:  # our own kernels are called past it: wall time is the whole
        start = time.perf_counter()
        model(x)
        wall = time.perf_counter() - start
    linear = sum(r.self_cpu_time_total for r in seen.key_averages() if r.key in LINEAR) / 1e6
    expected, found = (one(x) for one in (model, small))
    error = (found - expected).norm() / expected.norm()
    return {"linear": linear / wall, "time": integers / plain, "distance": error.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    file = parser.parse_args().out / "quantisation.json"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = json.loads(file.read_text()) if file.exists() else {}
    for name, size in MODELS:
        found[f"images/{name}"] = measure(name, size)
        print(name, found[f"images/{name}"], flush=True)
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
