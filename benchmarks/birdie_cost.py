"""What Gated SSM, Hawk and Birdie's data cost beside Mamba and Mamba-2, in CPU time; best of several, interleaved.

OMP_NUM_THREADS=1 python benchmarks/birdie_cost.py
"""

import time

import torch
from torch.nn import functional as F

import ssmzoo
from ssmzoo import ops
from ssmzoo.data.birdie.data import BirdieData

NAMES = ("mamba", "mamba2", "transformer", "gated_ssm", "hawk")
VOCAB, SHAPE = 256, (16, 256)


def best(functions: dict, repeats: int) -> dict[str, float]:
    """Least CPU time of each in seconds, taken in turns so that a busy machine is busy for all."""
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.process_time()
            function()
            found[name] = min(found[name], time.process_time() - start)
    return found


def step(model, ids):
    F.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()


@torch.no_grad()
def decode(model, ids, state):
    for _ in range(20):
        state = model(ids, state).state


def recurrence(backend, a, x):
    with ops.backend(backend):
        ops.gated_linear_recurrence(a, x).sum().backward()


def main():
    torch.manual_seed(0)
    a, x = torch.rand(*SHAPE, 256, requires_grad=True), torch.randn(*SHAPE, 256, requires_grad=True)
    times = best({b: lambda b=b: recurrence(b, a, x) for b in ("c", "torch")}, 4)
    print("gated_linear_recurrence:", ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in times.items()))
    models = {name: ssmzoo.create_model(name, vocab_size=VOCAB) for name in NAMES}
    size = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    ids = torch.randint(VOCAB, SHAPE)
    times = best({name: lambda m=m: step(m, ids) for name, m in models.items()}, 4)
    for name, t in times.items():
        ratio = t / size[name] / (times["mamba2"] / size["mamba2"])
        print(f"step of {name}: {1e3 * t:.0f} ms, {ratio:.2f} of mamba2's per parameter")
    with torch.no_grad():
        states = {name: m.eval()(ids[:1, :16]).state for name, m in models.items()}
    times = best({n: lambda n=n, m=m: decode(m, ids[:1, :1], states[n]) for n, m in models.items()}, 40)
    for name, t in times.items():
        ratio = t / size[name] / (times["mamba"] / size["mamba"])
        print(f"a token of {name}: {1e6 * t / 20:.0f} us, {ratio:.2f} of mamba's per parameter")
    data = BirdieData()
    data.setup()
    batch, model = data.training_batch(0), models["gated_ssm"]
    reading = {"one direction": {}, "both directions": {"prefix": batch["prefix"]}}
    for name, t in best(
        {n: lambda k=k: model(batch["input_ids"], seq_idx=batch["seq_idx"], **k) for n, k in reading.items()}, 4
    ).items():
        print(f"gated_ssm reads a batch in {name}: {1e3 * t:.0f} ms")
    print(f"a batch is made in {1e3 * best({'data': lambda: data.training_batch(1)}, 5)['data']:.0f} ms")


if __name__ == "__main__":
    main()
