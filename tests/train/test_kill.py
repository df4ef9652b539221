"""A small version of benchmarks/kill_test.py: runs that are killed again and again equal one that is not."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.parametrize(
    "task",
    ["formal", *(pytest.param(task, marks=pytest.mark.slow) for task in ("language", "classification", "restoration"))],
)
def test_killed_runs_equal_the_run_that_was_not_killed(tmp_path, task):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/kill_test.py"), "--only", task, "--kills", "2", "--out", "kills"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    tally = json.loads((tmp_path / "kills/tally.json").read_text())["all"]
    assert tally["kills"] >= 2 and tally["rows"] > 100 and tally["mismatches"] == tally["unreadable"] == 0
