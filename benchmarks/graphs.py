"""Fill docs/results/graphs.md: Graph-Mamba beside GPS and GatedGCN, orders of the nodes, cost against size, packing.

    python benchmarks/graphs.py --budget 10             what is missing, for so many minutes; then the page
    python benchmarks/graphs.py --only digits,cost
    python benchmarks/graphs.py --page-only

A run is train.py in a process of its own, on one thread, with seeds 0, 1 and 2. What is done is one line of
results.jsonl under --runs and is not repeated, nor is what stands in docs/results/graphs.json, their summary. Costs are
CPU seconds, which other work on the machine touches less than it does a clock on the wall; sizes and forms alternate
within one run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from claim_runs import forked, train_once
from graphs_page import SUMMARY, write_page
from recall import import_everything, load, note

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
MODELS = {"Graph-Mamba": "graph_mamba", "GPS": "gps", "GatedGCN alone": "gated_gcn"}
ORDERS = ("degree_noise", "degree", "random", "stored")
SHORT = ("trainer.max_steps=300", "trainer.val_check_interval=50", "model.d_model=32")
CLAIMS = {  # name: (arguments of all its runs, {arm: arguments})
    "digits": (("trainer.max_steps=500",), {n: (f"model={m}",) for n, m in MODELS.items()}),
    "ring": (
        ("data=ring_transfer", *SHORT),
        {n: (f"model={m}",) for n, m in MODELS.items()},
    ),
    "tree": (
        ("data=tree_transfer", *SHORT),
        {o: ("model=graph_mamba", f"model.order={o}") for o in ORDERS},
    ),
    "orders": (
        ("trainer.max_steps=500",),
        {o: ("model=graph_mamba", f"model.order={o}") for o in ORDERS[1:]},
    ),
}
SIZES = (100, 300, 1000, 3000, 10_000, 30_000, 100_000)
LIMIT = 60  # CPU seconds for one size of one model
SPREADS = {
    "all of 200 nodes": (200, 200),
    "50 to 400 nodes": (50, 400),
    "20 to 1,000 nodes": (20, 1000),
    "8 to 2,000 nodes": (8, 2000),
}


def jobs(names: list[str], seeds: list[int], done: dict) -> Iterator[tuple[str, list[str]]]:
    """(key, arguments of train.py) of what is missing, seed by seed."""
    for seed in seeds:
        for claim in (n for n in names if n in CLAIMS):
            common, arms = CLAIMS[claim]
            for arm, words in arms.items():
                key = f"{claim}/{arm}/{seed}"
                if key not in done:
                    yield key, [*words, *common, f"seed={seed}", "trainer.accelerator=cpu", "callbacks.watchdog=null"]


def trained(folder: Path) -> dict:
    from ssmzoo.checkpoint_files import find_checkpoint, read_index, read_weights
    from ssmzoo.train.logger import read_metrics

    index = read_index(folder / "checkpoints")
    rows = read_metrics(folder / "metrics.csv")
    curve = [[int(r["step"]), round(r["val/accuracy"], 5)] for r in rows if "val/accuracy" in r]
    weights = read_weights(find_checkpoint(folder))
    return {
        "accuracy": index["best"][0]["value"],
        "curve": curve,
        "parameters": sum(w.numel() for w in weights.values()),
    }


def train(key: str, words: list[str], runs: Path) -> dict | None:
    claim, arm, seed = key.split("/")
    found = train_once(words, runs, key.replace("/", "-").replace(" ", "_"), trained)
    return found and {"claim": claim, "arm": arm, "seed": int(seed)} | found


def lattice(n: int) -> dict:
    """One graph: every node is tied to its three next ones on a ring, and every tenth to a random one."""
    import torch

    generator, i = torch.Generator().manual_seed(n), torch.arange(n)
    pairs = [torch.stack([i, (i + k) % n]) for k in (1, 2, 3)]
    pairs.append(torch.stack([i[::10], torch.randint(n, (len(i[::10]),), generator=generator)]))
    edges = torch.cat([*pairs, *(p.flip(0) for p in pairs)], dim=1)
    return {
        "x": torch.randn(n, 3, generator=generator),
        "edge_index": edges,
        "edge_attr": torch.ones(edges.shape[1], 1),
    }


def step_cost(model: str, n: int) -> dict:
    """CPU seconds of a training step and bytes it needs beyond what stood before."""
    import torch

    from ssmzoo.zoo import create_model

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    torch.manual_seed(0)
    net, graph = create_model(model), lattice(n)
    net(lattice(50)).logits.sum().backward()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    before = resident("VmRSS")
    repeats, times = max(1, min(5, 3000 // n)), []
    for _ in range(repeats):
        started = time.process_time()
        net(graph).logits.sum().backward()
        times.append(time.process_time() - started)
    return {"seconds": min(times), "bytes": max(0, resident("VmHWM") - before)}


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def cost(runs: Path, done: dict) -> Iterator[tuple[str, dict]]:
    """(key, row) of every size and model that is missing; none larger than one that took too long."""
    for n in SIZES:
        for arm, model in MODELS.items():
            key = f"cost/{arm}/{n}"
            before = [done[k] for k in (f"cost/{arm}/{m}" for m in SIZES if m < n) if k in done]
            if key in done or any(row["seconds"] is None for row in before):
                continue
            status, _, _ = forked(lambda m=model, n=n: step_cost(m, n), runs / "cost.json")
            found = {"seconds": None, "bytes": None} if status else json.loads((runs / "cost.json").read_text())
            yield key, {"claim": "cost", "arm": arm, "nodes": n, "limit": LIMIT} | found


def packing(_: Path, done: dict) -> Iterator[tuple[str, dict]]:
    """CPU seconds of the scan over 64 graphs, forward and backward, packed and padded to the largest, in turns."""
    import torch

    from ssmzoo.layers.graph.batch import Graphs
    from ssmzoo.layers.mixers.mamba import Mamba
    from ssmzoo.models.graph_mamba_layers.order import draw, scan_order
    from ssmzoo.models.graph_mamba_layers.scan import NodeScan

    torch.manual_seed(0)
    scan, found = NodeScan(48), {}
    for name, (low, high) in SPREADS.items() if "packing" not in done else ():
        generator = torch.Generator().manual_seed(1)
        share = torch.rand(64, generator=generator)
        sizes = torch.exp(math.log(low) + share * (math.log(high) - math.log(low))).round().long()
        batch = torch.repeat_interleave(torch.arange(64), sizes)
        v, longest = len(batch), int(sizes.max())
        graphs = Graphs.of({"x": torch.zeros(v, 1), "edge_index": torch.randint(v, (2, 0)), "batch": batch})
        h = torch.randn(v, 48, generator=generator, requires_grad=True)
        draws = draw(graphs, 1, 1, None)

        def padded(h=h, graphs=graphs, draws=draws, longest=longest):
            places, sequence = scan_order(scan.order, graphs, draws, True)
            slot = graphs.batch * longest + graphs.index_in_graph()  # of the node in this place of the order
            dense = h.new_zeros(64 * longest, 48).index_copy(0, slot, h[places[0]]).view(64, longest, 48)
            y, _ = Mamba.forward(scan, dense)
            return y.flatten(0, 1)[slot][places[0].argsort()]

        def packed(h=h, graphs=graphs, draws=draws):
            return scan(h, graphs, draws)

        with torch.no_grad():
            off = float((packed() - padded()).norm() / padded().norm())
        times: dict[str, list[float]] = {"packed": [], "padded": []}
        for _ in range(5):
            for form, function in (("packed", packed), ("padded", padded)):
                started = time.process_time()
                function().sum().backward()
                times[form].append(time.process_time() - started)
        found[name] = {"nodes": v, "slots": 64 * longest, "difference": off} | {k: min(t) for k, t in times.items()}
    if "packing" not in done:
        yield "packing", {"claim": "packing", "packing": found}


MEASURES = {"cost": cost, "packing": packing}


def main() -> None:
    known = [*CLAIMS, *MEASURES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(known), help=f"some of {', '.join(known)}")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; no run starts after them")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "claims_graphs")
    parser.add_argument("--page-only", action="store_true", help="from docs/results/graphs.json")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := [n for n in names if n not in known]:
        parser.error(f"unknown claim {unknown[0]}; choose from {', '.join(known)}")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    runs, until = arguments.runs.resolve(), time.monotonic() + 60 * arguments.budget
    kept = json.loads(SUMMARY.read_text()) if SUMMARY.exists() else []
    if not arguments.page_only:
        os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # before torch is imported
        runs.mkdir(parents=True, exist_ok=True)
        held = runs / "results.jsonl"
        done = {row["key"]: row for row in kept} | load(held)
        import_everything()
        for name in (n for n in names if n in MEASURES):
            for key, row in MEASURES[name](runs, done):
                note(done, held, key, row)
                print(f"{key}: {row}", flush=True)
        for key, words in list(jobs(names, seeds, done)):
            if time.monotonic() < until and (found := train(key, words, runs)) is not None:
                note(done, held, key, found)
                print(f"{key}: {100 * found['accuracy']:.1f} %, {found['cpu_seconds']:.0f} CPU s", flush=True)
        SUMMARY.write_text("[\n" + ",\n".join(json.dumps(row) for _, row in sorted(done.items())) + "\n]\n")
    write_page(json.loads(SUMMARY.read_text()), SUMMARY.with_suffix(".md"))
    print(f"written: {SUMMARY.with_suffix('.md')}")


if __name__ == "__main__":
    main()
