"""What routing costs: a MoE layer against a dense feed-forward of the same active FLOPs, forward and backward.

    python benchmarks/moe.py [--threads 1] [--tokens 4096] [--d-model 192] [--d-expert 576]

Prints the time of the dense layer and, for 8 and 32 experts, of the whole MoE layer (router, losses, sort, gather,
experts, scatter) with and without dropping, and of the expert multiplications alone: grouped_mm, the Python loop of the
reference, and one batched matmul on buffers of equal counts (what a one-hot dispatch would use, without its cost).
CPU time, which other programs on the machine do not blur; on an idle machine with one thread it is the wall time.
"""

import argparse
import functools
import time

import torch

from ssmzoo.layers.feedforward.mlp import FeedForward
from ssmzoo.layers.feedforward.moe import build_moe
from ssmzoo.ops.moe_dispatch import grouped_matmul, grouped_matmul_reference


def milliseconds(step, repeats: int = 15) -> float:
    """Median over `repeats` calls after two that do not count."""
    times = []
    for i in range(repeats + 2):
        start = time.process_time()
        step()
        if i > 1:
            times.append((time.process_time() - start) * 1e3)
    return sorted(times)[len(times) // 2]


def time_experts(e: int, x: torch.Tensor, f: int, target: torch.Tensor, dense: float) -> None:
    """The two multiplications of e experts of width f in three ways. x, target (t d)"""
    t, d = x.shape
    ends = torch.searchsorted(torch.randint(0, e, (t,)).sort().values, torch.arange(e), right=True).to(torch.int32)
    w1, w2 = (torch.randn(e, a, b, requires_grad=True) for a, b in ((d, f), (f, d)))
    padded = torch.randn(e, t // e, d, requires_grad=True)
    ways = {
        "grouped_mm": lambda: grouped_matmul(grouped_matmul(x, w1, ends).relu(), w2, ends),
        "loop": lambda: grouped_matmul_reference(grouped_matmul_reference(x, w1, ends).relu(), w2, ends),
        "padded bmm": lambda: torch.bmm(torch.bmm(padded, w1).relu(), w2),
    }

    def step(forward):
        y = forward()
        w1.grad = w2.grad = None
        y.backward(target[: y.shape[:-1].numel()].reshape(y.shape))

    for name, forward in ways.items():
        ms = milliseconds(functools.partial(step, forward))
        print(f"{f'  experts alone, {e}, {name}':<34}{ms:8.1f} ms  {ms / dense:5.2f}x dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 1), ("tokens", 4096), ("d-model", 192), ("d-expert", 576)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    t, d, f = args.tokens, args.d_model, args.d_expert
    x, target = torch.randn(1, t, d, requires_grad=True), torch.randn(1, t, d)

    def train_step(module):
        def step():
            out = module(x)
            y, aux = out if isinstance(out, tuple) else (out, {})
            loss = (y * target).sum() + sum(v for k, v in aux.items() if k.endswith("_loss"))
            module.zero_grad()
            loss.backward()

        return step

    dense = milliseconds(train_step(FeedForward(d, f)))
    print(f"{t} tokens, d_model {d}, d_expert {f}, {args.threads} threads")
    print(f"{'dense, equal active FLOPs':<34}{dense:8.1f} ms")
    for e in (8, 32):
        for label, factor in (("no drop", None), ("capacity 1.0", 1.0)):
            moe = build_moe(d, e, f, capacity_factor=factor)
            ms = milliseconds(train_step(moe))
            print(f"{f'MoE, {e} experts, {label}':<34}{ms:8.1f} ms  {ms / dense:5.2f}x dense")
        time_experts(e, x[0], f, target[0], dense)


if __name__ == "__main__":
    main()
