"""Runs that repeat: `trainer.deterministic=true`, and kernels without atomics."""

import csv

import pytest
import torch
from paths import ROOT

from ssmzoo import ops


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.use_deterministic_algorithms(False)


def losses(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [row["train/loss"] for row in rows if row.get("train/loss")]


@pytest.mark.parametrize("model", ["moe_mamba", "sd_ssm"])
def test_deterministic_runs_are_equal(call, tmp_path, model):
    sizes = (
        "data.seq_len=32 data.val_tokens=128 task.sample_tokens=0" if model == "moe_mamba" else "data.test_samples=4"
    )
    found = []
    for name in ("a", "b"):
        status, _, err = call(
            f"model={model}",
            "trainer.deterministic=true",
            "data.batch_size=2",
            *sizes.split(),
            "trainer.max_steps=3",
            "trainer.val_check_interval=3",
            "trainer.limit_val_batches=1",
            "trainer.log_every_n_steps=1",
            "trainer.accelerator=cpu",
            f"name={name}",
        )
        assert status == 0, err
        found.append(losses(tmp_path / "runs" / model / name))
    assert found[0] == found[1] and len(found[0]) == 3


def test_no_kernel_has_atomics():
    kernels = [*(ROOT / "ssmzoo" / "ops").rglob("triton_kernels*.py")]
    assert len(kernels) >= 8
    assert not [file for file in kernels if "atomic_" in file.read_text(encoding="utf-8")]


def test_the_page_names_operators_that_have_kernels():
    page = (
        (ROOT / "docs" / "gpu.md")
        .read_text(encoding="utf-8")
        .partition("with Triton kernels:")[2]
        .partition("\n\nA ")[0]
    )
    named = [part for line in page.splitlines()[3:] for part in line.split("|")[1].split("`")[1::2]]
    assert len(named) >= 10
    for name in named:
        assert name == "ssd_state_update" or "triton" in ops.OPERATORS[name].backends, name
