"""Predicted against measured peak memory of training on a CPU, a process per case.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
    MALLOC_MMAP_THRESHOLD_=131072 OMP_NUM_THREADS=1 python benchmarks/memory.py    # a mapping per tensor
    python benchmarks/memory.py --runs [moe_mamba vmamba mambair]                  # whole default runs, cut short

Prediction: `ssmzoo info MODEL --memory --batch B`. Measurement: the largest resident set (VmHWM) over five updates
minus what is resident before the model is built, after a small model was trained once, so that libraries that load late
are not counted. With --runs: the largest resident set of `python train.py model=MODEL` as a whole, of a few updates
and a validation.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path

CASES = {  # model: (samples, further settings)
    "mamba": (32, []),
    "mamba2": (32, []),
    "moe_mamba": (32, []),
    "transformer": (32, []),
    "vmamba": (256, []),
    "spatial_mamba": (128, []),
    "vim_tiny": (16, []),
    "mambair": (16, []),
    "sd_ssm": (4096, ["data.curriculum=uniform"]),
    "mamba_25m": (8, []),
}
STEPS = 5
RUNS = ("moe_mamba", "vmamba", "mambair")  # `make train` and the defaults that hold most
RUN_STEPS, ALLOWED = 12, 1024  # updates; MiB that a default run may take


def resident(key: str) -> int:
    """Bytes by /proc: VmRSS now, VmHWM at its largest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}; this needs Linux")


def measure(model: str, overrides: list[str]) -> dict:
    """Train for a few updates in this process and say what it took."""
    import torch
    from hydra import compose, initialize_config_dir

    from ssmzoo.presets import config_dir
    from ssmzoo.train import config, memory
    from ssmzoo.train.build import build, build_data
    from ssmzoo.train.freed_memory import keep_freed_memory
    from ssmzoo.train.quiet import quiet

    quiet()
    keep_freed_memory()  # as the trainer does; not where MALLOC_* is set
    config.register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", config.free_overrides([f"model={model}", *overrides]))
    data, plain = build_data(cfg)
    warm = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(warm.parameters())
    warm(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    small = {k: v[:2] for k, v in next(iter(data.train_dataloader())).items()}
    task = build(cfg).task  # once in small, for kernels and late imports
    update(task, task.optim(task.model)["optimizer"], small)
    batch = memory.longest(next(iter(data.train_dataloader())), getattr(data, "max_length", 0))
    del task
    gc.collect()
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    task = build(cfg).task
    task.train()
    optimizer = task.optim(task.model)["optimizer"]
    for _ in range(STEPS):
        update(task, optimizer, {k: v.clone() if hasattr(v, "clone") else v for k, v in batch.items()})
    return {"measured": resident("VmHWM") - before}


def update(task, optimizer, batch: dict) -> None:
    out = task.step(batch, training=True)
    loss = out.loss if out.auxiliary is None else out.loss + out.auxiliary
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def predict(model: str, overrides: list[str]) -> dict:
    from ssmzoo.train.memory import of_run

    found, size, _ = of_run([f"model={model}", *overrides])
    return {"predicted": found.resident(), "batch": size, "traced": found.traced}


def whole_run(model: str) -> float:
    """MiB, the largest resident set of a default run that ends after a few updates with a validation and its report."""
    import os
    import tempfile

    root = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        steps = [f"trainer.max_steps={RUN_STEPS}", f"trainer.val_check_interval={RUN_STEPS}"]
        command = [sys.executable, str(root / "train.py"), f"model={model}", f"runs_dir={folder}", *steps]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{model}: {said[-2000:]}")
    return usage.ru_maxrss / 1024  # KiB on Linux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"some of {', '.join(CASES)}")
    parser.add_argument("--runs", action="store_true", help="whole default runs instead")
    parser.add_argument("--one", choices=("measure", "predict"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        batch, more = CASES[args.models[0]]
        action = {"measure": measure, "predict": predict}[args.one]
        print("RESULT " + json.dumps(action(args.models[0], [f"data.batch_size={batch}", *more])))
        return
    if args.runs:
        found = {model: whole_run(model) for model in args.models or RUNS}
        print("\n".join(f"{model:<16}{peak:>8.0f} MiB resident" for model, peak in found.items()))
        return sys.exit(any(peak > ALLOWED for peak in found.values()))
    print(f"{'model':<16}{'batch':>6}{'predicted MiB':>15}{'measured MiB':>14}{'error':>8}  traced with")
    for model in args.models or CASES:
        found: dict = {}
        for what in ("predict", "measure"):
            command = [sys.executable, __file__, model, "--one", what]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{model} {what}: {done.stderr[-2000:]}")
            found |= json.loads(lines[0][7:])
        error = 100 * (found["predicted"] / found["measured"] - 1)
        print(
            f"{model:<16}{found['batch']:>6}{found['predicted'] / 2**20:>15,.1f}{found['measured'] / 2**20:>14,.1f}"
            f"{error:>+7.1f}%  {found['traced']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
