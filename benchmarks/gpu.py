"""The GPU backends: right, and how fast? One command on a machine with a CUDA GPU.

    python benchmarks/gpu.py [--quick] [--dtypes bf16 fp16 fp32] [--lengths 2048 16384] [--out benchmarks/results]

First every operator on every backend that is there (our Triton kernels, mamba-ssm's and causal-conv1d's where they are
installed, PyTorch) is compared with the float64 reference, outputs and gradients; then the selective scan (batch 8,
2048 channels, 16 states), the convolution in front of it and Mamba-2's scan of the same width are timed, forward and
forward + backward, medians of interleaved runs. Prints tables; writes gpu_check.csv, gpu_time.csv, gpu_time.png.
Exit status 1 when a backend is wrong.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ssmzoo import ops  # noqa: E402
from ssmzoo.released.golden import relative_error  # noqa: E402

BACKENDS = ("triton", "mamba_ssm", "torch")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# relative errors allowed (outputs, gradients); with 16 bits the gradient that comes in is rounded, too, and sums cancel
TOLERANCE = {"bf16": (1e-2, 5e-2), "fp16": (2e-3, 1e-2), "fp32": (1e-5, 1e-4)}


def scan_call(device, dtype, b, d, l, n=16, last=False, extras=False) -> dict:
    """Arguments of selective_scan_fn; `last`: channels next to each other in memory; `extras`: all optional ones."""

    def sequence():
        return torch.randn(b, l, d, device=device).transpose(1, 2) if last else torch.randn(b, d, l, device=device)

    call = dict(
        u=sequence(),
        delta=sequence() - 2,
        B=torch.randn(b, n, l, device=device),
        C=torch.randn(b, n, l, device=device),
        z=sequence(),
    )
    call = {name: t.to(dtype) for name, t in call.items()}
    call |= dict(
        A=-torch.rand(d, n, device=device) * n,
        D=torch.randn(d, device=device),
        delta_bias=torch.rand(d, device=device),
        delta_softplus=True,
    )
    if extras:
        call |= dict(initial_state=torch.randn(b, d, n, device=device), seq_idx=documents(device, b, l))
    return call


def conv_call(device, dtype, b, d, l, last=False, extras=False) -> dict:
    x = torch.randn(b, l, d, device=device).transpose(1, 2) if last else torch.randn(b, d, l, device=device)
    call = dict(
        x=x.to(dtype), weight=torch.randn(d, 4, device=device), bias=torch.randn(d, device=device), activation="silu"
    )
    return call | (dict(seq_idx=documents(device, b, l)) if extras else {})


def ssd_call(device, dtype, b, d, l, n=128, extras=False) -> dict:
    p = min(64, d)
    h = d // p
    call = dict(
        x=torch.randn(b, l, h, p, device=device),
        B=torch.randn(b, l, 1, n, device=device),
        C=torch.randn(b, l, 1, n, device=device),
    )
    call = {name: t.to(dtype) for name, t in call.items()}
    call |= dict(
        dt=torch.randn(b, l, h, device=device) - 2,
        A=-torch.rand(h, device=device) * 4,
        D=torch.randn(h, device=device),
        dt_softplus=True,
    )
    if extras:
        call |= dict(z=torch.randn(b, l, h, p, device=device).to(dtype), seq_idx=documents(device, b, l))
    return call


def documents(device, b, l) -> torch.Tensor:
    return (torch.rand(b, l, device=device) < 0.02).cumsum(1)


OPERATORS = {
    "selective_scan": (ops.selective_scan_fn, scan_call, [{}, {"last": True}, {"extras": True}]),
    "causal_conv1d": (ops.causal_conv1d_fn, conv_call, [{}, {"last": True}, {"last": True, "extras": True}]),
    "ssd": (ops.mamba_chunk_scan_combined, ssd_call, [{}, {"extras": True}]),
}


def objection(function, backend: str, call: dict) -> str | None:
    if backend not in function.backends:
        return f"no {backend} kernel for this operator"
    return function.backends[backend].objection(function.Arguments(**call))


def gradients(function, backend: str, call: dict, dtype=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of a fixed loss, computed in `dtype` or in the arguments' own."""
    call = {
        k: (v.detach() if dtype is None else v.detach().to(dtype)).requires_grad_()
        if torch.is_tensor(v) and v.is_floating_point()
        else v
        for k, v in call.items()
    }
    leaves = [v for v in call.values() if torch.is_tensor(v) and v.requires_grad]
    with ops.backend(backend):
        out = function(**call)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    return [out], list(torch.autograd.grad((out.double() * weight).sum(), leaves))


def check(device: str, dtypes: list[str], sizes=(2, 128, 300)) -> list[dict]:
    """One row per operator, variant, dtype and backend."""
    rows = []
    for name, (function, make, variants) in OPERATORS.items():
        for variant in variants:
            for dtype in dtypes:
                torch.manual_seed(0)
                call = make(device, DTYPES[dtype], *sizes, **variant)
                expected = gradients(function, "reference", call, torch.float64)
                for backend in BACKENDS:
                    probe = {
                        k: v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
                        for k, v in call.items()
                    }
                    row = dict(operator=name, variant=" ".join(variant), dtype=dtype, backend=backend, out="", grad="")
                    why = objection(function, backend, probe)
                    if why is None:
                        got = gradients(function, backend, call)
                        errors = [max(map(relative_error, *pair)) for pair in zip(got, expected)]
                        right = all(e < limit for e, limit in zip(errors, TOLERANCE[dtype]))
                        row |= dict(out=f"{errors[0]:.1e}", grad=f"{errors[1]:.1e}")
                    rows.append(row | dict(verdict=why or ("ok" if right else "WRONG")))
    return rows


def timed(run, device: str) -> float:
    """Milliseconds of one call, with an idle GPU before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def runner(function, backend: str, call: dict, training: bool):
    """A function without arguments: forward, or forward and backward."""
    if training:
        call = {
            k: v.detach().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in call.items()
        }
    leaves = [v for v in call.values() if torch.is_tensor(v) and v.requires_grad]

    def run():
        with ops.backend(backend):
            out = function(**call)
        if training:
            torch.autograd.grad(out, leaves, torch.ones_like(out))

    return run, objection(function, backend, call)


def measure(device: str, dtypes: list[str], lengths: list[int], b=8, d=2048, repeats=15, slowest=4096) -> list[dict]:
    """One row per operator, layout, dtype, length, pass and backend; PyTorch's forms up to length `slowest`."""
    rows = []
    cases = [
        (name, variant)
        for name, (_, _, variants) in OPERATORS.items()
        for variant in variants
        if "extras" not in variant
    ]
    for name, variant in cases:
        function, make, _ = OPERATORS[name]
        for dtype in dtypes:
            for l in lengths:
                call = make(device, DTYPES[dtype], b, d, l, **variant)
                for training in (False, True):
                    runs = {}
                    for backend in BACKENDS if l <= slowest else BACKENDS[:2]:
                        run, why = runner(function, backend, call, training)
                        if why is None:
                            run()  # compiles
                            runs[backend] = run
                    times: dict[str, list[float]] = {backend: [] for backend in runs}
                    for _ in range(repeats):
                        for backend, run in runs.items():
                            times[backend].append(timed(run, device))
                    for backend, values in times.items():
                        rows.append(
                            dict(
                                operator=name,
                                variant=" ".join(variant),
                                dtype=dtype,
                                length=l,
                                what="forward + backward" if training else "forward",
                                backend=backend,
                                ms=f"{statistics.median(values):.3f}",
                            )
                        )
                        print(" | ".join(map(str, rows[-1].values())), flush=True)
                del call
    return rows


def write(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict], path: Path) -> None:
    """Time against length: a panel per operator, layout and pass, a line per backend and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r["operator"], r["variant"], r["what"]) for r in rows))
    figure, axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(10, 3 * -(-len(panels) // 2)), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for r in rows:
            if (r["operator"], r["variant"], r["what"]) == panel:
                lines.setdefault((r["backend"], r["dtype"]), []).append((r["length"], float(r["ms"])))
        for (backend, dtype), points in lines.items():
            axis.loglog(*zip(*points), "o-", label=f"{backend} {dtype}", markersize=3)
        layout = ", channels last" if panel[1] else ""
        axis.set_title(f"{panel[0]}{layout}: {panel[2]}", fontsize=9)
        axis.set_xlabel("length (tokens)", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384])
    parser.add_argument("--quick", action="store_true", help="bf16 at length 2048 only")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks/gpu.py needs a CUDA GPU, and torch {torch.__version__} finds none here; the "
            "Triton kernels are checked without one by `python -m pytest tests/ops/test_triton.py`."
        )
    warnings.simplefilter("once")
    dtypes, lengths = (["bf16"], [2048]) if args.quick else (args.dtypes, args.lengths)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    checks = check("cuda", dtypes)
    for row in checks:
        print(" | ".join(row.values()))
    write(checks, args.out / "gpu_check.csv")
    print("\nmilliseconds, batch 8, 2048 channels")
    times = measure("cuda", dtypes, lengths)
    write(times, args.out / "gpu_time.csv")
    draw(times, args.out / "gpu_time.png")
    print(f"\n{args.out}/gpu_check.csv, gpu_time.csv, gpu_time.png")
    wrong = sum(row["verdict"] == "WRONG" for row in checks)
    if wrong:
        raise SystemExit(f"{wrong} of {len(checks)} checks are wrong, see above")


if __name__ == "__main__":
    main()
