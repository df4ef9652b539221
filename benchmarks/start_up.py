"""From the command line to the first step: CPU and wall seconds, and what the imports before it take.

    OMP_NUM_THREADS=1 python benchmarks/start_up.py moe_mamba mamba rnn

Starts `python train.py model=NAME` and stops it when its first line of progress appears. CPU seconds are those of the
process (from /proc: Linux), which other work on the machine changes less than the clock. The imports are those of one
more start under -X importtime, each package's own time added up.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def start(model: str, folder: str, *flags: str) -> tuple[float, float, str]:
    """(CPU seconds, seconds, what was written to stderr) until the first step is done."""
    command = [
        sys.executable,
        *flags,
        str(ROOT / "train.py"),
        f"model={model}",
        f"runs_dir={folder}",
        "trainer.accelerator=cpu",
    ]
    with open(Path(folder) / "stderr", "w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder)
        for line in process.stdout:
            if line.startswith("step 1/"):
                break
        else:
            raise SystemExit(f"{model} did not come to its first step: {Path(errors.name).read_text()[-500:]}")
        wall = time.perf_counter() - began
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        process.kill()
        process.wait()
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), wall, Path(errors.name).read_text()


def imports(report: str) -> dict[str, float]:
    """{package: seconds that its own modules took}, most first."""
    found: collections.Counter = collections.Counter()
    for own, module in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)", report):
        found[module.partition(".")[0]] += int(own) / 1e6
    return dict(found.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["moe_mamba", "mamba"])
    parser.add_argument("--times", type=int, default=3, help="starts per model, of which the median is taken")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'model':<16}{'CPU s':>8}{'wall s':>8}   load of the machine {os.getloadavg()[0]:.1f}")
        for model in args.models:
            start(model, folder)  # once to fill the caches of files and corpus
            runs = [start(model, folder)[:2] for _ in range(args.times)]
            print(f"{model:<16}" + "".join(f"{statistics.median(column):>8.2f}" for column in zip(*runs)), flush=True)
        packages = imports(start(args.models[0], folder, "-X", "importtime")[2])
    total = sum(packages.values())
    print(
        f"imports {total:.2f} s: "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in packages.items() if seconds > 0.02 * total)
    )


if __name__ == "__main__":
    main()
