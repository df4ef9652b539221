"""Parity with the official implementations: every stored case, values and gradients."""

from pathlib import Path

import pytest

from ssmzoo.golden import GoldenCase

CASES = sorted((Path(__file__).parent / "golden").glob("*/*.json"))


@pytest.mark.parametrize("file", CASES, ids=[f"{f.parent.name}/{f.stem}" for f in CASES])
def test_matches_the_official_implementation(file):
    outputs, gradients = GoldenCase.load(file).check()
    assert outputs < 1e-4
    assert gradients is None or gradients < 1e-4
