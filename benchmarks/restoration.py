"""Image restoration in figures; results go to docs/results/restoration.json and, as a page, restoration.md beside it.

    python benchmarks/restoration.py speed [--threads 1] [--loop-rows 180]   MambaIR-light x2 on 320 x 180 pixels
    python benchmarks/restoration.py claim [--arms ...] [--seeds 0 1 2]      MambaIR, its ablations and its Swin twin
    python benchmarks/restoration.py memory [--ckpt X] [--model PRESET]      a photograph of 24 megapixels, x2
    python benchmarks/restoration.py run RUN_FOLDER TITLE                    enter a finished or stopped training run
    python benchmarks/restoration.py page                                    write the page again

`speed` compares with SwinIR-light of the package spandrel where that is installed (pip install --no-deps spandrel).
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from restoration_page import write_page  # beside this file

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "restoration.json"
ARMS = {
    "mambair": ["model=mambair"],
    "swinir": ["model=swinir"],
    "no channel attention": ["model=mambair", "model.cab=convolution"],
    "no local convolution": ["model=mambair", "model.cab=attention"],
}


def store(key: str, value) -> None:
    """Enter one result and write the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results.setdefault(key.split("/")[0], {})["/".join(key.split("/")[1:])] = value
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, RESULTS.with_suffix(".md"))


def scan_loop(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The scan as the official code runs it without CUDA: all of exp(delta A) and delta B u, then a Python loop."""
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    B, C = (M.repeat_interleave(u.shape[1] // M.shape[1], dim=1) for M in (B, C))
    decay, write = torch.exp(torch.einsum("bdl,dn->bdln", delta, A)), torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    h, ys = torch.zeros_like(decay[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + write[:, :, t]
        ys.append(torch.einsum("bdn,bdn->bd", h, C[..., t]))
    return torch.stack(ys, dim=2) + u * D[:, None]


def timed(call):
    """(result, CPU seconds of all threads, seconds)"""
    cpu, wall = time.process_time(), time.perf_counter()
    result = call()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def speed(threads: int, loop_rows: int, repeats: int) -> None:
    from ssmzoo import create_model
    from ssmzoo._torchvision import make_importable
    from ssmzoo.train.freed_memory import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    torch.manual_seed(0)
    ours, x = create_model("mambair_light_x2").eval(), torch.rand(1, 3, 180, 320)
    models = {"ssmzoo MambaIR-light (905,016 parameters)": ours}
    try:
        make_importable()
        from spandrel.architectures.SwinIR import SwinIR

        models["spandrel SwinIR-light"] = SwinIR(
            upscale=2,
            img_size=64,
            window_size=8,
            img_range=1.0,
            depths=[6] * 4,
            embed_dim=60,
            num_heads=[6] * 4,
            mlp_ratio=2,
            upsampler="pixelshuffledirect",
        ).eval()
    except ImportError as error:
        print(f"no SwinIR: {error}")
    times: dict[str, list] = {name: [] for name in models}
    with torch.inference_mode():
        for i in range(repeats + 1):
            for name, model in models.items():
                _, cpu, wall = timed(lambda model=model: model(x))
                times[name] += [(cpu, wall)] if i else []
        rows = {name: [statistics.median(v) for v in zip(*values)] for name, values in times.items()}
        loop = loop_against(ours, x[:, :, :loop_rows]) if loop_rows else {}
    for name, (cpu, wall) in [*rows.items(), *loop.get("rows", {}).items()]:
        print(f"{name:48}{cpu:9.2f} CPU s{wall:9.2f} s", flush=True)
    store(f"speed/{threads}", {"rows": rows, "loop": loop, "loop_rows": loop_rows, "repeats": repeats})


def loop_against(model, x) -> dict:
    """The model as it is and with its scans as a Python loop, on the same picture."""
    from ssmzoo.ops import observe

    model(x)
    ours, *fast = timed(lambda: model(x))
    with observe(selective_scan_fn=lambda whole, *a, **k: scan_loop(*a, **k)):
        theirs, *slow = timed(lambda: model(x))
    return {
        "rows": {"ssmzoo MambaIR-light": fast, "the same model, scans as a Python loop": slow},
        "difference": float((ours - theirs).abs().max()),
    }


def train(arm: str, seed: int, steps: int, runs: Path) -> None:
    """One run; its PSNR on whole held-out photographs and its CPU seconds are entered."""
    name = f"{arm.replace(' ', '_')}-{seed}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *ARMS[arm],
            f"seed={seed}",
            f"name={name}",
            f"runs_dir={runs}",
            f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={steps}",
            "data.val_crop=null",
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    row = per_picture(next(runs.glob(f"*/{name}"))) | {"cpu_seconds": round(cpu, 1), "steps": steps}
    print(arm, seed, row, flush=True)
    store(f"claim/{arm}/{seed}", row)


def per_picture(run: Path) -> dict:
    with open(run / "per_image.csv") as file:
        rows = list(csv.DictReader(file))
    mean = {k: statistics.mean(float(r[k]) for r in rows) for k in ("psnr", "ssim", "baseline_psnr", "baseline_ssim")}
    return mean | {"pictures": {r["name"]: [float(r["psnr"]), float(r["baseline_psnr"])] for r in rows}}


def claim(arms: list[str], seeds: list[int], steps: int, runs: Path | None) -> None:
    done = json.loads(RESULTS.read_text()).get("claim", {}) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in seeds:
            for arm in arms:
                if done.get(f"{arm}/{seed}", {}).get("steps") != steps:
                    train(arm, seed, steps, runs or Path(temporary))


def memory(ckpt: str, preset: str | None, width: int, height: int) -> None:
    """`ssmzoo restore` of a large picture in a process of its own; its peak resident memory."""
    import numpy as np
    from skimage.data import astronaut

    from ssmzoo import create_model
    from ssmzoo.data.image_file import Picture, write_picture

    with tempfile.TemporaryDirectory() as folder:
        photo = np.tile(astronaut(), (-(-height // 512), -(-width // 512), 1))[:height, :width]
        write_picture(Path(folder, "in.png"), Picture(np.ascontiguousarray(photo)))
        chosen = ["--ckpt", ckpt]
        if preset:  # memory does not depend on the weights
            torch.save(create_model(preset).state_dict(), f"{folder}/w.pth")
            chosen = ["--ckpt", f"{folder}/w.pth", "--model", preset]
        command = [
            sys.executable,
            "-m",
            "ssmzoo.cli.main",
            "restore",
            f"{folder}/in.png",
            *chosen,
            "-o",
            f"{folder}/out.png",
            "--device",
            "cpu",
        ]
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        peak = [0]

        def watch() -> None:
            while process.poll() is None:
                try:
                    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    peak[0] = max([peak[0], *(int(n.split()[1]) for n in lines if n.startswith("VmHWM"))])
                except OSError:
                    return
                time.sleep(0.2)

        watcher = threading.Thread(target=watch)
        watcher.start()
        printed, _ = process.communicate()
        watcher.join()
        if process.returncode:
            raise SystemExit(f"restore failed with status {process.returncode}")
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        row = {
            "pixels": f"{width} x {height}",
            "peak_gib": peak[0] / 2**20,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "seconds": time.monotonic() - started,
        }
        print(printed, row)
        store(f"memory/{preset or Path(ckpt).name}, {width} x {height}", row)


def run(folder: Path, title: str, cpu_seconds: float | None) -> None:
    """Enter the validations of a training run as they stand in its metrics.csv."""
    from ssmzoo.train.logger import read_metrics

    rows = [r for r in read_metrics(folder / "metrics.csv") if "val/psnr" in r]
    points = [[int(r["step"]) + 1, r["val/psnr"], r["val/ssim"]] for r in rows]
    more = per_picture(folder) if (folder / "per_image.csv").exists() else {}
    store(f"runs/{title}", {"points": points, "cpu_seconds": cpu_seconds} | more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument(
        "--loop-rows",
        type=int,
        default=180,
        help="rows of the picture for the Python loop, which takes minutes for all 180; 0: none",
    )
    one = commands.add_parser("claim")
    one.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    one.add_argument("--steps", type=int, default=200)
    one.add_argument("--runs", type=Path, help="keep the run folders here")
    one = commands.add_parser("memory")
    one.add_argument("--ckpt", default=str(ROOT / "notebooks" / "checkpoints" / "restoration"))
    one.add_argument("--model", help="a preset with random weights in place of --ckpt")
    one.add_argument("--size", nargs=2, type=int, default=[6000, 4000], metavar=("WIDTH", "HEIGHT"))
    one = commands.add_parser("run")
    one.add_argument("folder", type=Path)
    one.add_argument("title")
    one.add_argument("--cpu-seconds", type=float, help="CPU time of the run, user and system, as `time` gives it")
    commands.add_parser("page")
    a = parser.parse_args()
    if a.command == "speed":
        speed(a.threads, a.loop_rows, a.repeats)
    elif a.command == "claim":
        claim(a.arms, a.seeds, a.steps, a.runs)
    elif a.command == "memory":
        memory(a.ckpt, a.model, *a.size)
    elif a.command == "run":
        run(a.folder, a.title, a.cpu_seconds)
    else:
        write_page(json.loads(RESULTS.read_text()), RESULTS.with_suffix(".md"))


if __name__ == "__main__":
    main()
