"""Two checkouts of this project side by side: CPU time of the same work by each, in alternation.

    OMP_NUM_THREADS=1 python benchmarks/versions.py ../other-checkout [--only scan] [--repeats 5]

Each checkout has processes of its own (its kernels must have been built: python -m ssmzoo.ops.native.build). Work:
our contender of every case of `ssmzoo bench` that both checkouts have, a training step and a forward of each default
model, and of the smallest ones a step of `train.py`: batch, loss, gradients, clipping, optimiser, rows. The median of
the ratios of neighbouring runs is printed, above 1 where this checkout is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROCESSES = 3  # of each checkout, for each piece of work
WIDTH = {"vocab_size": 256, "d_model": 128}
LANGUAGE = {
    **{name: {**WIDTH, "n_layer": 4} for name in ("mamba", "mamba2", "mamba3")},
    "moe_mamba": {**WIDTH, "n_blocks": 2},
    "transformer": {**WIDTH, "n_blocks": 2, "n_heads": 4},
    "rnn": {"input_size": 16, "num_classes": 16},
    "sd_ssm": {"input_size": 16, "num_classes": 16},
    "complex_diagonal_ssm": {"input_size": 16, "num_classes": 16},
}
SMALL = {"sd_ssm": ["max_steps=150"], "rnn": ["max_steps=150"], "mamba": ["max_steps=15", "model.d_model=32"]}
IMAGES = {
    "vim_tiny": 224,
    "vmamba_tiny": 224,
    "spatial_mamba_tiny": 224,
    "shuffle_mamba_tiny": 224,
    "adventurer_tiny": 224,
    "res_vmamba_tiny": 224,
    "mambair_light_x2": 48,
}


def model_work(name: str, train: bool, **arguments):
    """A function that runs the model once (with its backward where `train`) on random input of its kind."""
    import torch

    torch.manual_seed(0)
    if name in IMAGES:
        import ssmzoo
        import ssmzoo.timm  # noqa: F401

        model, x = ssmzoo.create_model(name), torch.randn(1, 3, IMAGES[name], IMAGES[name])
    else:
        import ssmzoo

        model, x = ssmzoo.create_model(name, **LANGUAGE[name] | arguments), torch.randint(0, 16, (4, 257))
    model.train(train)

    def run():
        with torch.set_grad_enabled(train):
            out = model(x)
            out = getattr(out, "logits", out)
        if train:
            out.float().square().mean().backward()
            model.zero_grad()

    return run


def trainer_work(name: str, steps: str, *overrides: str):
    """A function that trains as `python train.py model=NAME` would, without validation: CPU ms of one of its steps."""
    from ssmzoo._torchvision import make_importable

    make_importable()
    import lightning as L
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from ssmzoo.presets import config_dir
    from ssmzoo.train.build import build, build_loop
    from ssmzoo.train.config import register_resolvers
    from ssmzoo.train.freed_memory import keep_freed_memory
    from ssmzoo.train.quiet import quiet

    class Clock(L.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx) -> None:
            self.times = [*getattr(self, "times", []), time.process_time()]

    register_resolvers()
    quiet()
    keep_freed_memory()
    asked = [f"model={name}", f"trainer.{steps}", "trainer.limit_val_batches=0", "trainer.accelerator=cpu", *overrides]

    def run() -> float:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", [*asked, "callbacks.checkpoint.every_n_minutes=0"])
        OmegaConf.update(cfg, "model_name", name, force_add=True)
        with tempfile.TemporaryDirectory() as folder:
            objects, clock = build(cfg), Clock()
            trainer = build_loop(objects, Path(folder)).trainer
            trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "Checkpointer"] + [clock]
            trainer.fit(objects.task, datamodule=objects.data)
        later = clock.times[len(clock.times) // 5 :]
        return 1e3 * (later[-1] - later[0]) / (len(later) - 1)

    return run


def work() -> dict:
    """Name -> function that prepares the work, of the checkout this process runs."""
    import ops

    found = {}
    for case in ops.load_cases(""):
        if case.unit == "ms":
            found[case.name] = next(iter(case.contenders.values()))
    for name in (*LANGUAGE, *IMAGES):
        for train in (False, True):
            found[f"{name}: {'forward and backward' if train else 'forward'}"] = lambda name=name, train=train: (
                model_work(name, train)
            )
    found["mamba, d_model 32: forward and backward"] = lambda: model_work("mamba", True, d_model=32)
    for name, asked in SMALL.items():
        found[", ".join([name, *asked[1:]]) + ": step of train.py"] = lambda name=name, a=asked: trainer_work(name, *a)
    return found


def serve() -> None:
    """Answer `names`, `prepare NAME` and `run` on standard input; milliseconds of CPU time for the last."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    cases, run = work(), None

    def answer(text: object) -> None:
        print(text, file=out, flush=True)

    for line in sys.stdin:
        order, _, name = line.strip().partition(" ")
        try:
            if order == "names":
                answer("\t".join(cases))
            elif order == "prepare":
                run = cases[name]()
                run()
                answer("ready")
            else:
                started = time.process_time()
                own = run()  # its own measure of a part, or whatever the work returns
                answer(own if isinstance(own, float) else 1e3 * (time.process_time() - started))
        except Exception as error:
            answer(f"failed: {error!r:.150}".replace("\n", " "))


class Checkout:
    def __init__(self, folder: Path):
        path = os.pathsep.join([str(folder), str(folder / "benchmarks")])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "versions.py"), "--serve"],
            cwd=folder, env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, order: str) -> str:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip("\n")


def compare(other: Path, only: str, repeats: int) -> None:
    here = HERE.parent
    here_names, other_names = (Checkout(folder).ask("names").split("\t") for folder in (here, other))
    names, shared = [name for name in here_names if only in name], set(other_names)
    print(f"| work | {other.name}, CPU ms | this checkout, CPU ms | ratio |\n|---|---|---|---|")
    for name in filter(shared.__contains__, names):
        times: list[list[float]] = []
        for _ in range(PROCESSES):  # where a process puts its memory matters as much as its code does
            sides = Checkout(other), Checkout(here)
            said = [side.ask(f"prepare {name}") for side in sides]
            if said == ["ready", "ready"]:
                times += [[float(side.ask("run")) for side in sides] for _ in range(repeats)]
            for side in sides:
                side.process.kill()
        if not times:
            print(f"| {name} | {said[0]} | {said[1]} | |", flush=True)
            continue
        before, after = (statistics.median(column) for column in zip(*times))
        ratio = statistics.median(a / max(b, 1e-9) for a, b in times)
        print(f"| {name} | {before:.2f} | {after:.2f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="folder of the other checkout")
    parser.add_argument("--only", default="", help="work whose name has this in it")
    parser.add_argument("--repeats", type=int, default=5, help="runs in each process")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
    elif arguments.other is None or not (arguments.other / "ssmzoo").is_dir():
        parser.error("name the folder of another checkout of this project")
    else:
        compare(arguments.other.resolve(), arguments.only, arguments.repeats)


if __name__ == "__main__":
    main()
