"""What recomputation saves in memory and costs in time, measured on the model at hand before it trains."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ssmzoo.train.memory import Peak
from ssmzoo.train.recomputation import is_decoder


def cost(model: nn.Module, how: bool | str, vocab_size: int, length: int, repeats: int = 3) -> str:
    """A sentence on memory and time of forward and backward of some sequences, with recomputation and without.

    Leaves weights, gradients and random states as they are.
    """
    rows = max(1, 2048 // length)
    device = next(model.parameters()).device
    ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        logits = model(ids).logits
        torch.autograd.grad(logits.float().logsumexp(-1).mean(), parameters, allow_unused=True)

    parameters, found = [p for p in model.parameters() if p.requires_grad], {}
    with torch.random.fork_rng(devices=[]):
        for mode in (False, how):
            model.set_grad_checkpointing(mode)
            step()
            times = []
            for _ in range(repeats):
                start = time.process_time()
                step()
                times.append(time.process_time() - start)
            with Peak() as tracker:
                step()
            found[mode] = tracker.peak, min(times)
    (kept, before), (now, after) = found[False], found[how]
    saved, slower = 100 * (now / kept - 1), after / max(before, 1e-9)
    return (
        f"grad_checkpointing={str(how).lower()}: {rows} sequences of {length} tokens hold {now / 2**20:.1f} MB at the "
        f"peak in place of {kept / 2**20:.1f} ({saved:+.0f} %) and take {slower:.2f} times the time"
    )


def describe(model: nn.Module, plain: dict[str, Any], data: Any) -> str | None:
    """`cost` of a run's language model on the CPU when it recomputes; None otherwise."""
    how, vocabulary = plain.get("grad_checkpointing"), getattr(data, "sizes", {}).get("vocab_size")
    if not how or not vocabulary or not is_decoder(model) or plain.get("compile"):
        return None
    return cost(model, how, vocabulary, getattr(data, "seq_len", 256))
