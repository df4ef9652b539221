"""Programs that share cores: a small training step alone, and with as many programs as asked for at a time.

    python benchmarks/sharing.py [--programs 2] [--seconds 4]

Each program trains the same small Mamba with as many threads as there are cores. `spinning` is how OpenMP's threads
wait by default, `asleep` how `train.py` and `ssmzoo` have them wait (ssmzoo/threads.py). The slow-down is beyond the
share: 1 where two programs each take twice as long as one alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from ssmzoo.threads import SPINS


def steps(seconds: float) -> None:
    """Train for some seconds from a moment on that all programs know; print milliseconds a step."""
    import torch

    import ssmzoo

    torch.manual_seed(0)
    model, ids = ssmzoo.create_model("mamba", vocab_size=256, d_model=64, n_layer=2), torch.randint(0, 256, (4, 129))

    def step():
        model(ids).logits.square().mean().backward()
        model.zero_grad()

    step()
    print("ready", flush=True)
    sys.stdin.readline()
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        step()
        count += 1
    print(1e3 * (time.perf_counter() - start) / count, flush=True)


def together(programs: int, seconds: float, environment: dict[str, str]) -> float:
    """Milliseconds a step, the mean of programs that run at the same time."""
    command = [sys.executable, __file__, "--one", "--seconds", str(seconds)]
    plain = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *SPINS)}
    started = [
        subprocess.Popen(command, env=plain | environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(programs)
    ]
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    return statistics.mean(float(process.communicate()[0]) for process in started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return steps(args.seconds)
    print(
        f"| threads wait | one program, ms a step | {args.programs} programs | beyond their share |\n|---|---|---|---|"
    )
    for name, environment in (("spinning", {}), ("asleep", SPINS)):
        alone, shared = (together(n, args.seconds, environment) for n in (1, args.programs))
        print(f"| {name} | {alone:.1f} | {shared:.1f} | {shared / alone / args.programs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
