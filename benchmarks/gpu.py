"""The GPU backends: right, and how fast? One command, under eight minutes, on a machine with a GPU.

    python benchmarks/gpu.py                       # everything; again: goes on where it stopped
    python benchmarks/gpu.py --dry-run             # what it would do, and how long
    python benchmarks/gpu.py --only check times    # some sections
    python benchmarks/gpu.py --device cpu --toy    # the whole pipeline at toy size, without a GPU

card      what it is: bandwidth of a copy, products in bf16
check     every operator on every backend that is there, three dtypes, values and gradients, against float64
times     operators of Mamba's layers: Triton, mamba-ssm and flash-linear-attention where installed, PyTorch
train     training steps of whole models in bf16: time, tokens or images per second, peak memory, share of the products
decode    tokens per second of the 130M models, by batch, with and without a CUDA graph

Every part runs in a process of its own with a time limit, and adds its rows to OUT/gpu.jsonl as they come: what dies or
hangs costs its own part. From these OUT/gpu_<section>.csv, OUT/gpu.md and OUT/gpu.png are written, after each part.
Exit status 1 when a backend is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "tests")]
TRAINED = (
    "mamba_130m",
    "mamba2_130m",
    "moe_mamba_25m",
    "vmamba_tiny",
    "spatial_mamba_tiny",
    "mambair_light_x2",
    "sd_ssm",
)
TIMED = {  # part: what of it; the calls are in gpu_calls.py
    "selective_scan": "selective_scan_fn",
    "causal_conv1d": "causal_conv1d_fn",
    "ssd": "mamba_chunk_scan_combined",
    "attention": "gated_delta_rule, taylor_attention",
    "recurrences": "trapezoidal_scan, gated_linear_recurrence, complex_scan, dense_scan",
    "norms": "rms_norm, gated_layer_norm",
    "steps": "selective_state_update, causal_conv1d_update",
    "layer steps": "mamba3_step, gated_delta_step, quantized_linear",
}


class Part(NamedTuple):
    """section, what of it; seconds: expected on an H100, and its limit is three times that but at least a minute."""

    section: str
    name: str
    seconds: int
    what: str

    @property
    def limit(self) -> int:
        return max(60, 3 * self.seconds)


PARTS = (
    Part("card", "card", 10, "bandwidth of a copy of 1 GB, product of 8192 x 8192 matrices in bf16"),
    Part("check", "small", 75, "all operators at the sizes of the tests, bf16 fp16 fp32, values and gradients"),
    Part("check", "layers", 35, "layers' operators at b 2, d 128, l 300, all options, values and gradients"),
    *(
        Part("times", name, 22, f"{what}: d 2048, " + ("one token" if "steps" in name else "b 8, forward and backward"))
        for name, what in TIMED.items()
    ),
    *(Part("train", name, 16, f"{name}: 3 + 8 training steps, bf16") for name in TRAINED),
    *(Part("decode", name, 22, f"{name}: 64 tokens at batch 1, 8, 64, 256") for name in ("mamba_130m", "mamba2_130m")),
)


def done(file: Path, machine: str) -> set[tuple[str, str]]:
    """Parts that ended well on this machine."""
    return {(r["section"], r["part"]) for r in rows(file) if r.get("machine") == machine and r.get("ended") == "well"}


def rows(file: Path) -> list[dict]:
    if not file.exists():
        return []
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # half a line, of a process that was stopped
            continue
    return found


def run(part: Part, args, machine: str, limit: float) -> str:
    """One part in a process of its own; how it ended."""
    command = [
        sys.executable,
        str(HERE / "gpu_parts.py"),
        part.section,
        part.name,
        str(args.out / "gpu.jsonl"),
        machine,
    ]
    command += ["--device", args.device, *(["--toy"] if args.toy else [])]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(HERE.parent)})
    try:
        status = process.wait(limit)
        ended = "well" if status == 0 else f"badly, with status {status}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        ended = f"at its limit of {limit:.0f} s"
    note = dict(section=part.section, part=part.name, machine=machine, ended=ended)
    note["seconds"] = round(time.perf_counter() - start, 1)
    with (args.out / "gpu.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
    return ended


def describe(device: str, toy: bool) -> str:
    """What results belong to: the card and the versions."""
    code = (
        "import torch\n"
        "try:\n import triton; t = triton.__version__\nexcept Exception: t = 'none'\n"
        f"name = torch.cuda.get_device_name() if {device!r} == 'cuda' else 'CPU'\n"
        "print(f'{name}, torch {torch.__version__}, triton {t}')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        last = found.stderr.strip().splitlines()[-1:]
        raise SystemExit(
            f"benchmarks/gpu.py needs a GPU, and torch finds none here ({''.join(last)}). `--device cpu --toy` runs "
            "the whole of it without one at toy size, `--dry-run` lists it; the Triton kernels are checked without by "
            "`python -m pytest tests/ops/test_triton*.py`."
        )
    return found.stdout.strip() + (", toy sizes" if toy else "")


def main() -> None:
    sections = list(dict.fromkeys(part.section for part in PARTS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sections, default=sections, help="sections; all by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument(
        "--minutes", type=float, default=8, help="time for all of it; what is left is left for next time"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what is there and begin anew")
    parser.add_argument("--dry-run", action="store_true", help="list the parts and their expected times, run nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    parts = [part for part in PARTS if part.section in args.only]
    if args.dry_run:
        for part in parts:
            print(f"{part.section:7} {part.name:20} {part.seconds:4d} s, at most {part.limit:4d} s   {part.what}")
        total = sum(part.seconds for part in parts)
        print(f"{len(parts)} parts, {total // 60} min {total % 60} s expected on an H100 (estimated, not measured)")
        return
    machine = describe(args.device, args.toy)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "gpu.jsonl"
    if args.fresh:
        file.unlink(missing_ok=True)
    print(machine, flush=True)
    end, ready = time.monotonic() + 60 * args.minutes, done(file, machine)
    from gpu_report import write

    for part in parts:
        left = end - time.monotonic()
        if (part.section, part.name) in ready:
            print(f"{part.section} {part.name}: there already", flush=True)
        elif left < 5:
            print(f"{part.section} {part.name}: no time left; run the same command again", flush=True)
        else:
            ended = run(part, args, machine, min(part.limit, left))
            print(f"{part.section} {part.name}: ended {ended}", flush=True)
            write(rows(file), args.out, machine)
    write(rows(file), args.out, machine)
    print(f"{args.out}/gpu.md, gpu.png, " + ", ".join(f"gpu_{section}.csv" for section in args.only))
    wrong = [r for r in rows(file) if r.get("machine") == machine and r.get("verdict") == "WRONG"]
    if wrong:
        raise SystemExit(f"{len(wrong)} checks are wrong: " + ", ".join(sorted({r["operator"] for r in wrong})))


if __name__ == "__main__":
    main()
