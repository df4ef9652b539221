"""Create a virtual environment and install ssmzoo into it with the pinned versions of constraints.txt.

Needs Python 3.10 or newer and a package index, nothing else. Without an NVIDIA GPU a CPU build of torch is taken where
the index or the machine offers one, so that no CUDA libraries are downloaded.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "dev,vision,formal,wandb,tensorboard"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(folder: str) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  an older Python may well run this file
        sys.exit(
            f"error: Python {sys.version.split()[0]} is too old; ssmzoo needs 3.10 or newer (make PYTHON=python3.12)"
        )
    venv = ROOT / folder
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if not python.exists() or subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        print(f"setting up {venv}, once: about three minutes with a fast connection", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    print("1/4 pip and setuptools", flush=True)
    run([*pip, "install", "pip>=23.1", "setuptools>=77", "wheel"])
    print("2/4 torch", flush=True)
    install_torch(pip, str(python))
    print("3/4 ssmzoo with its libraries, and the CPU kernels", flush=True)
    run([*pip, "install", "-c", str(ROOT / "constraints.txt"), "--no-build-isolation", "-e", f"{ROOT}[{EXTRAS}]"])
    print("4/4 torchvision that fits torch", flush=True)
    pair_torchvision(pip, python)
    run([str(python), "-c", "from ssmzoo.ops.native import LEVEL, MISSING; print('CPU kernels:', LEVEL or MISSING)"])


def install_torch(pip: list, python: str) -> None:
    """torch first and alone: from the plain index where a GPU is, otherwise the CPU build where one can be had."""
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    have = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    if have.returncode == 0 and have.stdout.strip().split("+")[0] == pin.split("==")[1]:
        return
    if has_nvidia_gpu() or sys.platform != "linux":  # elsewhere the index's default build is the CPU one
        return run([*pip, "install", pin])
    for source in (
        [],
        ["--index-url", CPU_INDEX],
    ):  # a CPU wheel known to pip's own configuration, else PyTorch's index
        if not source and not plain_pip_has_cpu_build(pip, pin):
            continue
        command = [*pip, "install", "--retries", "1", "--timeout", "15", *source, pin]
        if patient(command)[0] == 0:
            return
    print("no CPU build of torch can be reached; installing the default build", flush=True)
    run([*pip, "install", pin])


def pair_torchvision(pip: list, python: Path) -> None:
    """A torchvision that imports beside a CPU torch: its CPU build from PyTorch's index, else the index's CUDA build
    with the operators declared that its compiled part would bring (see ssmzoo/_torchvision.py)."""
    check = [str(python), "-c", "import torchvision"]
    if subprocess.run(check, capture_output=True).returncode == 0:
        return
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torchvision=="))
    source = ["--index-url", CPU_INDEX, "--retries", "0", "--timeout", "15", "--no-deps", "--force-reinstall"]
    if sys.platform == "linux":
        subprocess.run([*pip, "install", *source, pin], capture_output=True)
        if subprocess.run(check, capture_output=True).returncode == 0:
            return
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    shutil.copy(ROOT / "ssmzoo" / "_torchvision.py", site / "_torchvision_beside_cpu_torch.py")
    start = "import _torchvision_beside_cpu_torch as t; t.cure_on_import()\n"
    (site / "_torchvision_beside_cpu_torch.pth").write_text(start)
    run(check)


def plain_pip_has_cpu_build(pip: list, pin: str) -> bool:
    """Would `pip install torch` take a build without CUDA here? (resolves only, downloads nothing large)"""
    plan = subprocess.run(
        [*pip, "install", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", pin],
        capture_output=True,
        text=True,
    )
    return plan.returncode == 0 and ("+cpu" in plan.stdout or "%2Bcpu" in plan.stdout)


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def run(command: list) -> None:
    """Warnings of a command that succeeds are left out: they are of other packages."""
    status, said = patient(command)
    if status != 0:
        print(said, file=sys.stderr)
        sys.exit(f"error: {' '.join(command[:8])} ... failed with status {status}; its output is above")


def patient(command: list) -> tuple[int, str]:
    """(status, standard error) of a command; a long one says every 20 seconds that it lives."""
    process, begun = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), time.monotonic()
    while True:
        try:
            _, said = process.communicate(timeout=20)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            print(f"    at it for {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".venv")
