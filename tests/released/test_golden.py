"""Parity with the official implementations: every stored case, values and gradients."""

import pytest
import torch
from paths import GOLDEN

from ssmzoo.released.golden import GoldenCase

CASES = sorted((GOLDEN).glob("*/*.json"))


@pytest.mark.parametrize("file", CASES, ids=[f"{f.parent.name}/{f.stem}" for f in CASES])
def test_matches_the_official_implementation(file):
    outputs, gradients = GoldenCase.load(file).check()
    assert outputs < 1e-4
    assert gradients is None or gradients < 1e-4


@pytest.mark.parametrize(
    "file",
    [f for f in CASES if f.parent.name in ("mamba", "moe_mamba", "selective_scan", "ssd")],
    ids=lambda f: f"{f.parent.name}/{f.stem}",
)
def test_in_float64_only_the_rounding_of_the_stored_tensors_is_left(file):
    outputs, gradients = GoldenCase.load(file, torch.float64).check()
    assert outputs < 1e-5
    assert gradients is None or gradients < 1e-5
