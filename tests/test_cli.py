"""Commands of the console script refuse what they would not use, in one line."""

import pytest

from ssmzoo.cli import bench


@pytest.mark.parametrize(
    "command, said",
    [
        (["list", "datas"], "nothing is listed as 'datas'; nearest: data"),
        (["list", "tasks", "nosuch*"], "no name of tasks fits 'nosuch*'"),
        (["list", "data", "--task", "language"], "--task chooses models"),
        (["list", "models", "--task", "langage"], "unknown task 'langage'; nearest: language"),
        (["list", "models", "mamba", "extra"], "list takes no argument 'extra'"),
        (["backends", "extra"], "backends takes no argument 'extra'"),
        (["info", "mamba", "--batch", "4"], "belong to --memory"),
        (["info", "mamba", "--gpus", "2"], "belong to --memory"),
        (["info", "mamba", "--memory", "d_modell=3"], "d_modell"),
        (["info", "mamba", "d_modell=3"], "nearest: d_model"),
        (["info", "mamba", "-x"], "info takes no argument '-x'"),
        (["bench", "scan", "--out", "FILE"], "needs a folder"),
        (["bench", "scan", "--out", "FILE/deeper"], "needs a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_in_one_line(call, tmp_path, command, said):
    (tmp_path / "FILE").write_text("mine")
    status, out, err = call(*command, entry="ssmzoo")
    assert status == 2 and said in err and len(err.splitlines()) == 1, err
    assert (tmp_path / "FILE").read_text() == "mine"


def test_arguments_of_the_model_shape_the_predicted_memory(call):
    sizes = []
    for width in (64, 128):
        status, out, err = call("info", "mamba", "--memory", f"d_model={width}", entry="ssmzoo")
        assert status == 0, err
        sizes.append(float(next(line for line in out.splitlines() if "gradients" in line).split()[-2].replace(",", "")))
    assert sizes[1] > 2 * sizes[0]


def test_lists_are_filtered_by_a_glob(call):
    status, out, err = call("list", "tasks", "lang*", entry="ssmzoo")
    assert status == 0 and out.startswith("language ") and len(out.splitlines()) == 1


def test_doctor_tells_what_a_bug_report_needs(call, monkeypatch):
    from ssmzoo.cli import doctor
    from ssmzoo.ops.native import LEVEL

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor, "installed", lambda package: None if package in ("timm", "sqlalchemy") else "7.8.9")
    status, out, err = call("doctor", entry="ssmzoo")
    lines = {line[2:20].strip(): line[20:] for line in out.splitlines() if line.startswith("  ")}
    assert (status, err) == (0, "") and lines["CPU"].startswith(LEVEL or "none: ")
    assert lines["torch"] == "7.8.9" and lines["timm"] == "-" and lines["OMP_NUM_THREADS"] == "1"
    assert lines["vision"].startswith("pip install 'timm>=") and "'sqlalchemy<2'" in lines["sweep"]
    assert lines["formal"] == "complete" and {"hf", "export", "dev", "cuda"} <= lines.keys()


def test_the_bench_compares_times_in_proportion_to_sizes():
    ops = bench._load()
    sizes = {"mamba": 1_000_000, "other": 2_000_000}
    case = ops.Case("decoding", dict.fromkeys(sizes), at_most=1.3, size=sizes.get)
    table = ops.report([(case, {"": {"mamba": 1.0, "other": 3.0}})]).splitlines()
    assert table[2:] == [
        "| decoding | mamba, 4.00 MB | 1 ms | 1.00 |  |",
        "| decoding | other, 8.00 MB | 3 ms | 1.50 | at most 1.3x |",
    ]


@pytest.mark.parametrize("name", ["../model/mamba", "./mamba", "x/../mamba", "/ROOT/mamba", "mamba/", ""])
def test_presets_are_names_and_no_paths(name):
    from ssmzoo.presets import config_dir, read_model_config

    assert read_model_config("mamba")["task"] == "language"
    with pytest.raises(ValueError, match="unknown model"):
        read_model_config(name.replace("/ROOT", str(config_dir() / "model")))
