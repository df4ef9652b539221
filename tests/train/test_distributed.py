"""Two processes on a CPU (gloo): the same global batch gives the same run as one process."""

import argparse
import os
from pathlib import Path

import forked
import pytest
from paths import ROOT

RUN = [
    "data.seq_len=32",
    "data.val_tokens=512",
    "task.sample_tokens=0",
    "trainer.max_steps=8",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
]


def train(tmp_path, *arguments):
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_RANK", "WORLD_SIZE", "SSMZOO_RUN"))
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SSMZOO_CACHE": str(tmp_path / "cache")}
    status, printed = forked.run(ROOT / "train.py", *arguments, cwd=tmp_path, env=environment)
    assert status == 0, printed


SIZES = {
    "mamba": ["model.d_model=16", "model.n_layer=1"],
    "moe_mamba": [
        "model.d_model=16",
        "model.n_blocks=1",
        "model.n_experts=4",
        "model.capacity_factor=null",
        "model.balance_weight=0.5",
        "model.z_loss_weight=0.01",
    ],
}
PER_BATCH = ("val/load_balancing_loss", "val/busiest_expert")  # no means over tokens: batches of 2 and of 4 differ
WAYS = {
    "one": ["data.batch_size=4"],
    "ddp": ["data.batch_size=2", "trainer=ddp", "trainer.devices=2"],
    "fsdp": ["data.batch_size=2", "trainer=fsdp", "trainer.devices=2"],
}


def rows(run: Path, prefix: str = "") -> dict[int, dict[str, float]]:
    """What metrics.csv holds: {step: {metric: value}}."""
    from ssmzoo.train.logger import read_metrics

    found: dict[int, dict[str, float]] = {}
    for row in read_metrics(run / "metrics.csv"):
        kept = {k: v for k, v in row.items() if k.startswith(("train/", "val/")) and k not in PER_BATCH}
        found.setdefault(int(row["step"]), {}).update(kept)
    return found


def compare(run: Path, other: Path, tolerance: float) -> None:
    """Every metric of every step, and the weights in the end."""
    from ssmzoo.checkpoint_files import read_weights

    a, b = rows(run), rows(other)
    assert sorted(a) == sorted(b) and len(a) >= 8
    for step in a:
        assert a[step] == pytest.approx(b[step], rel=tolerance, abs=tolerance), step
    a, b = read_weights(run, prefer="last"), read_weights(other, prefer="last")
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() < 20 * tolerance, name


@pytest.mark.parametrize(
    "model, way",
    [
        ("mamba", "ddp"),
        *(
            pytest.param(m, w, marks=pytest.mark.slow)
            for m, w in (("mamba", "fsdp"), ("moe_mamba", "ddp"), ("moe_mamba", "fsdp"))
        ),
    ],
)
def test_two_ranks_equal_one_and_continue_each_others_runs(tmp_path, model, way):
    corpus = f"data.path={argparse.__file__}"
    for name in ("one", way):
        train(tmp_path, f"model={model}", *SIZES[model], *RUN, corpus, *WAYS[name], f"name={name}")
    runs = tmp_path / "runs" / model
    compare(runs / way, runs / "one", 2e-5)
    single = ["trainer.devices=1", "trainer.strategy=auto", "data.batch_size=4"]
    double = ["trainer.devices=2", f"trainer.strategy={way}", "data.batch_size=2"]
    for name, settings in ((way, single), ("one", double)):
        train(tmp_path, f"resume=runs/{model}/{name}", *settings, "trainer.max_steps=10")
    assert sorted(rows(runs / way)) == list(range(1, 11)) and 10 in rows(runs / way)
    compare(runs / way, runs / "one", 2e-4)


def _shapes(rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from ssmzoo.models.moe_mamba import MoEMambaLM
    from ssmzoo.train.sharded import Sharded, whole

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = MoEMambaLM(vocab_size=16, d_model=16, n_blocks=2, n_experts=4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    strategy = Sharded()
    strategy._device_mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    strategy.shard(model)
    for name, p in model.named_parameters():
        assert p.to_local().shape[0] in (p.shape[0] // 2, -(-p.shape[0] // 2)), name
        if "lin1_weight" in name or "lin2_weight" in name:
            assert p.shape[0] == 4 and p.to_local().shape[0] == 2  # experts
    assert all(torch.equal(whole(v), before[k]) for k, v in model.state_dict().items())
    dist.barrier()
    dist.destroy_process_group()


def test_shards_hold_half_of_every_parameter_and_half_of_the_experts(tmp_path):
    both = [forked.context.Process(target=_shapes, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
