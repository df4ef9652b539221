"""When memory runs out in a training step: the same batch in halves, quarters, ..., with the same gradient on average.

The parts are checkpointed one by one (torch.utils.checkpoint): their activations are dropped after the forward pass and
recomputed in the backward pass, so that at any time only one part's are held. Lightning, the precision and DDP see one
step and one backward as before; the price is one more forward pass per step from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error for accelerators, or what its CPU allocator raises."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
    """`parts` batches of nearly equal size; every tensor and list of a batch has one entry per sample."""
    size = batch_size(batch)
    edges = [size * i // parts for i in range(parts + 1)]
    cut = part_of_graphs if "num_graphs" in batch else part_of
    return [cut(batch, a, b) for a, b in zip(edges, edges[1:])]


def part_of(batch: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Samples first .. end - 1."""
    return {k: v[first:end] for k, v in batch.items()}


def part_of_graphs(batch: dict[str, Any], first: int, end: int) -> dict[str, Any]:
    """Graphs first .. end - 1 of a batch of graphs: their nodes and edges, numbered from 0."""
    graph, (source, _) = batch["batch"], batch["edge_index"]
    nodes = (graph >= first) & (graph < end)
    start, part = int((graph < first).sum()), {"num_graphs": end - first}
    for name, value in batch.items():
        if name in ("edge_index", "edge_label_index"):
            part[name] = value[:, nodes[value[0]]] - start
        elif name == "edge_attr":
            part[name] = value[nodes[source]]
        elif name == "batch":
            part[name] = value[nodes] - first
        elif name == "y" and "edge_label_index" in batch:
            part[name] = value[nodes[batch["edge_label_index"][0]]]
        elif name == "y" and len(value) != len(graph):
            part[name] = value[first:end]
        elif name != "num_graphs":
            part[name] = value[nodes]
    return part


def batch_size(batch: dict[str, Any]) -> int:
    return batch["num_graphs"] if "num_graphs" in batch else len(next(iter(batch.values())))


def step_in_parts(step: Callable, labelled: Callable, batch: dict[str, Any], parts: int):
    """What `step(batch, training=True)` returns, computed in `parts` parts of the batch.

    labelled(part)  how many items the part's mean loss is a mean over; None: its samples
    """
    if parts == 1:
        return step(batch, training=True)

    def one(part: dict[str, Any]):
        return step(part, training=True)

    size = batch_size(batch)
    pieces = split(batch, min(parts, size))
    outs = [checkpoint(one, piece, use_reentrant=False) for piece in pieces]
    found = [labelled(piece) for piece in pieces]
    counts = [batch_size(p) / size if count is None else float(count) for p, count in zip(pieces, found)]
    weights = [count / sum(counts) for count in counts]

    def mean(values) -> Tensor:
        return sum(value * weight for value, weight in zip(values, weights))

    metrics = {k: mean([o.metrics[k] for o in outs]) for k in outs[0].metrics}
    auxiliary = None if outs[0].auxiliary is None else mean([o.auxiliary for o in outs])
    losses = outs[0].losses and {k: mean([o.losses[k] for o in outs]) for k in outs[0].losses}
    return type(outs[0])(mean([o.loss for o in outs]), metrics, sum(o.count for o in outs), auxiliary, losses)


def halve(parts: int, batch: dict[str, Any], step: int, error: BaseException) -> int:
    """Twice as many parts, with a warning; raises the error when a part is a single sample already."""
    size = batch_size(batch)
    if parts >= size:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(
        f"warning: out of memory at step {step}: each batch of {size} is computed in "
        f"{2 * parts} parts from now on; updates stay those of the whole batch and take about a third longer "
        f"(lower data.batch_size and raise trainer.accumulate_grad_batches to avoid that)",
        flush=True,
    )
    return 2 * parts
