"""Run folders written by an earlier release (commit 0b15cc1), one per task, stopped after two of four steps: they are
evaluated with the numbers they had and go on to the numbers that release went on to."""

import json
import shutil

import pytest
from paths import ROOT

from ssmzoo.train.logger import read_metrics

OLD = ROOT / "tests" / "train" / "old_runs"
RUNS = sorted(folder.name for folder in OLD.iterdir() if folder.is_dir())


@pytest.fixture
def old_run(call, tmp_path):
    def copy(name):
        expected = json.loads((OLD / name / "expected.json").read_text())
        folder = tmp_path / "runs" / expected["model"] / name
        shutil.copytree(OLD / name, folder, ignore=shutil.ignore_patterns("expected.json"))
        shutil.copy(OLD / "text.txt", tmp_path)
        return folder, expected

    return copy


def last_values(folder) -> dict[str, float]:
    rows = read_metrics(folder / "metrics.csv")
    return {key: value for row in rows for key, value in row.items() if value is not None}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_as_the_release_that_wrote_it_went_on(call, old_run, name):
    folder, expected = old_run(name)
    status, out, err = call(f"resume={folder}")
    assert status == 0, err
    found = last_values(folder)
    for key, value in expected["step 4"].items():
        if key != "epoch":
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", RUNS)
def test_evaluated_with_the_numbers_it_had(call, old_run, name):
    folder, expected = old_run(name)
    status, out, err = call(f"ckpt={folder}", entry="eval")
    assert status == 0, err
    for line in expected["evaluated"]:
        name, value = line.split("|")
        shown = next(row for row in out.splitlines() if row.startswith(name))
        assert float(shown.removeprefix(name).split()[0]) == pytest.approx(float(value), rel=1e-3), shown
