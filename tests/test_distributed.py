"""Two processes on a CPU (gloo): the same global batch gives the same run as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def losses(run: Path) -> dict[int, float]:
    from ssmzoo.train.logger import read_metrics

    return {int(r["step"]): r["train/loss"] for r in read_metrics(run / "metrics.csv") if "train/loss" in r}


@pytest.mark.parametrize(
    "model, size",
    [
        ("mamba", ["model.d_model=16", "model.n_layer=1"]),
        pytest.param(
            "moe_mamba",
            ["model.d_model=16", "model.n_blocks=1", "model.n_experts=4", "model.capacity_factor=null"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mamba", "moe_mamba"],
)
def test_two_ranks_equal_one_with_the_same_global_batch(tmp_path, model, size):
    corpus = f"data.path={ROOT / 'ssmzoo' / '*.py'}"
    train(
        tmp_path,
        f"model={model}",
        *size,
        *RUN,
        corpus,
        "data.batch_size=2",
        "trainer=ddp",
        "trainer.devices=2",
        "name=two",
    )
    train(tmp_path, f"model={model}", *size, *RUN, corpus, "data.batch_size=4", "name=one")
    two, one = (losses(tmp_path / "runs" / model / name) for name in ("two", "one"))
    assert sorted(two) == sorted(one) == list(range(8))
    assert all(abs(two[s] - one[s]) < 2e-3 * one[s] for s in one)  # masked labels weigh a little differently per rank
    train(
        tmp_path,
        f"resume=runs/{model}/two",
        "trainer.devices=1",
        "trainer.strategy=auto",
        "trainer.max_steps=10",
        "data.batch_size=4",
    )
    assert sorted(losses(tmp_path / "runs" / model / "two")) == list(range(10))
