"""Run folders shared by two processes, damaged, or a stranger's; comparisons that pool seeds only."""

import json
import os
import shutil

import forked
import pytest
from paths import ROOT
from test_changes import TINY
from test_sweeps import finished
from tried import tried

from ssmzoo.train import config as configuration
from ssmzoo.train.config import ConfigError, build_node, locate, plain_config

UNNAMED = [a for a in TINY if not a.startswith("name=")]


def start(tmp_path, *arguments) -> forked.Python:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return forked.Python(ROOT / "train.py", *arguments, cwd=tmp_path, env=environment)


def end(process) -> tuple[int, str]:
    out = process.communicate()
    return process.returncode, out


def test_two_runs_that_begin_in_one_second_have_a_folder_each(tmp_path):
    both = [start(tmp_path, *UNNAMED, "name=2026-01-01_00-00-00", f"seed={i}") for i in (0, 1)]
    ends = [end(process) for process in both]  # of a typed name one is refused
    assert sorted(status for status, _ in ends) == [0, 2]
    assert "is being trained by" in ends[0][1] + ends[1][1] or "holds a run already" in ends[0][1] + ends[1][1]


def test_a_name_nobody_typed_gives_way(tmp_path):
    from ssmzoo.train.ledger import Run, claimed

    first = Run(None, tmp_path / "noon", False, False)
    with claimed(first) as folder:
        assert folder == tmp_path / "noon"
        (folder / "config.yaml").write_text("{}")
        code = (
            "import sys; from pathlib import Path; from ssmzoo.train.ledger import Run, claimed\n"
            "with claimed(Run(None, Path(sys.argv[1]), False, False)) as folder: print(folder.name)"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        found = forked.run("-c", code, tmp_path / "noon", cwd=tmp_path, env=environment)
    assert found == (0, "noon-2\n")


def test_of_two_that_continue_one_run_one_is_refused_and_the_dead_hold_nothing(call, tmp_path):
    assert call(*TINY)[0] == 0
    run = tmp_path / "runs/lstm/a"
    before = (run / "config.yaml").read_bytes()
    both = [start(tmp_path, f"resume={run}", "trainer.max_steps=40") for _ in range(2)]
    ends = [end(process) for process in both]
    assert sorted(status for status, _ in ends) == [0, 2], ends
    assert sum("is being trained by" in out for _, out in ends) == 1
    assert (run / "config.yaml").read_bytes() != before
    assert call(f"resume={run}", "trainer.max_steps=42")[0] == 0  # the lock went with the processes


def test_a_damaged_run_is_named_and_hides_no_other(call, tmp_path):
    good = finished(tmp_path / "runs/good", 0.1, 0, [2.0, 1.0])
    for name, file, text in (
        ("bad_index", "checkpoints/index.json", '{"last": '),
        ("bad_config", "config.yaml", "a: [1"),
        ("bad_rows", "metrics.csv", "step,val/loss\n0,abc\n"),
    ):
        finished(tmp_path / "runs" / name, 0.1, 0, [2.0])
        (tmp_path / "runs" / name / file).write_text(text)
    status, out, _ = call("runs", "runs", entry="ssmzoo")
    assert status == 0 and good.rpartition("/")[2] in out and out.count("damaged: ") == 3
    assert (
        "bad_rows/metrics.csv" in out and "bad_config/config.yaml" in out and "bad_index/checkpoints/index.json" in out
    )
    status, _, err = call("runs", "runs", "more", entry="ssmzoo")
    assert status == 2 and "runs takes one folder" in err


def test_every_key_that_varies_is_a_label_and_only_seeds_are_pooled(call, tmp_path):
    runs = []
    for lr in (0.1, 0.2):
        for length in (8, 16):
            for seed in (0, 1):
                run = finished(tmp_path / f"runs/{lr}-{length}-{seed}", lr, seed, [2.0 * lr, lr * length + seed])
                data = f"data: {{seed: {seed}, max_length: {length}}}"
                config = f"model_name: lstm\nseed: {seed}\noptim: {{lr: {lr}}}\n{data}\n"
                (tmp_path / f"runs/{lr}-{length}-{seed}/config.yaml").write_text(config)
                runs.append(run)
    status, out, _ = call("runs", "compare", *runs, entry="ssmzoo")
    rows = [line for line in out.splitlines() if line.startswith("data.max_length=")]
    assert status == 0 and len(rows) == 4 and all(row.split()[2] == "2" for row in rows)
    assert {row.split("  ")[0] for row in rows} == {
        f"data.max_length={length}, optim.lr={lr}" for length in (8, 16) for lr in (0.1, 0.2)
    }


def test_a_key_that_happens_to_equal_the_seed_is_no_seed(call, tmp_path):
    runs = []
    for seed in (1, 2):
        runs.append(finished(tmp_path / f"runs/{seed}", 0.1, seed, [2.0, 1.0]))
        text = f"model_name: lstm\nseed: {seed}\nmodel: {{n_layer: {seed}}}\ndata: {{seed: {seed}}}\n"
        (tmp_path / f"runs/{seed}/config.yaml").write_text(text)
    _, out, _ = call("runs", "compare", *runs, entry="ssmzoo")
    assert "model.n_layer=1 " in out and "model.n_layer=2 " in out and "data.seed" not in out


def test_models_of_a_sweep_keep_their_learning_rates_in_the_label(call, tmp_path):
    runs = []
    for model, lr, width in (("mamba", 0.1, 8), ("mamba", 0.2, 8), ("lstm", 0.3, None)):
        name = f"{model}-{lr}"
        runs.append(finished(tmp_path / "runs" / name, lr, 0, [2.0, 1.0]))
        own = f"{{d_model: {width}}}" if width else "{state_size: 4}"
        text = f"model_name: {model}\nseed: 0\noptim: {{lr: {lr}}}\nmodel: {own}\n"
        (tmp_path / "runs" / name / "config.yaml").write_text(text)
    _, out, _ = call("runs", "compare", *runs, entry="ssmzoo")
    for label in ("mamba, optim.lr=0.1", "mamba, optim.lr=0.2", "lstm, optim.lr=0.3"):
        assert label in out


def test_the_last_steps_are_validated_logged_and_named(call, tmp_path):
    from ssmzoo.train.logger import read_metrics

    status, out, _ = call(*TINY, "trainer.max_steps=5")
    rows = read_metrics(tmp_path / "runs/lstm/a/metrics.csv")
    assert [r["step"] for r in rows if "val/loss" in r] == [2, 4, 5]
    assert status == 0 and "weights reported" in out and "step 5" in out
    for name in ("optim/lr", "system/memory_GiB", "system/strings_per_s", "time/data_wait"):
        assert all(name in r for r in rows if "train/loss" in r), name


@pytest.mark.parametrize("name", ["", "..", "/tmp/elsewhere", "a/../../b", "."])
def test_a_name_stays_below_the_folder_of_runs(call, tmp_path, name):
    status, _, err = call(*UNNAMED, f"name={name}")
    assert status == 2 and err.count("\n") == 1 and not list(tmp_path.iterdir()), err


def test_an_interrupted_run_leaves_curves_and_a_report(tmp_path):
    from ssmzoo.train.callbacks import stop

    finished(tmp_path / "run", 0.1, 0, [2.0, 1.0])
    with pytest.raises(SystemExit):
        stop(tmp_path / "run", "stopped by SIGTERM at step 2")
    text = (tmp_path / "run/report.md").read_text()
    assert "stopped by SIGTERM" in text and (tmp_path / "run/curves.png").stat().st_size > 1000


FOREIGN = [
    ("data", "_target_", "ssmzoo.data.image_file.write_picture"),
    ("data", "_target_", "ssmzoo.tasks.formal.FormalLanguage"),
    ("data", "_target_", "ssmzoo.models.lstm.LSTM"),
    ("task", "_target_", "ssmzoo.data.formal.FormalData"),
    ("task", "_target_", "ssmzoo.tasks.formal.consistency"),
    ("model", "_target_", "ssmzoo.data.formal.FormalData"),
    ("data", "language", {"_target_": "ssmzoo.data.image_file.write_picture"}),
    ("optim", "_target_", "os.system"),
    ("callbacks", "progress", {"_target_": "os.system"}),
    ("data", "language", "${oc.env:SECRET}"),
    ("data", "language", ["${oc.decode:${oc.env:SECRET}}"]),
    ("task", "extra", {"deep": {"deeper": "${oc.env:SECRET}"}}),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    assert end(start(folder, *TINY))[0] == 0
    return folder / "runs/lstm/a"


@pytest.mark.parametrize("node, key, value", FOREIGN, ids=[f"{n}.{k} {str(v)[:30]}" for n, k, v in FOREIGN])
def test_a_strangers_configuration_runs_and_resolves_nothing(call, tmp_path, trained, monkeypatch, node, key, value):
    import yaml

    monkeypatch.setenv("SECRET", "hunter2")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config[node][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"config": config}))
    for arguments, entry in (([f"ckpt={run}"], "eval"), ([f"resume={run}", "trainer.max_steps=9"], "train")):
        tried("commands on a stranger's run")
        status, out, err = call(*arguments, entry=entry)
        assert status == 2 and err.count("\n") == 1, (entry, err)
        assert "refused" in err or "models" in err or "unknown key" in err
        assert "hunter2" not in out + err and "Traceback" not in err


def test_every_function_and_class_of_the_data_and_task_rooms_is_refused_but_modules_and_tasks():
    import importlib
    import inspect
    import pkgutil

    import lightning as L

    import ssmzoo.data
    import ssmzoo.tasks
    from ssmzoo.tasks.base import Task

    refused = 0
    for package, kind in ((ssmzoo.data, L.LightningDataModule), (ssmzoo.tasks, Task)):
        prefix = f"{package.__name__}."
        for found in pkgutil.walk_packages(package.__path__, prefix):
            for name, member in vars(importlib.import_module(found.name)).items():
                if callable(member) and not (inspect.isclass(member) and issubclass(member, kind)):
                    with pytest.raises(ConfigError, match="refused"):
                        locate(f"{found.name}.{name}", prefix)
                    refused += 1
    tried("functions and classes named as a data module or task", refused)
    assert refused > 200


def test_control_codes_of_names_and_files_do_not_reach_the_terminal(call, tmp_path):
    run = finished(tmp_path / "runs/\x1b[2Jevil", 0.1, 0, [1.0])
    (tmp_path / "runs/\x1b[2Jevil/status.txt").write_text("failed\n\x1b]0;title\x07 it broke\n")
    _, out, err = call("runs", "runs", entry="ssmzoo")
    assert "\\x1b[2Jevil" in out and "\x1b" not in out + err and "\x07" not in out + err
    _, out, err = call(f"ckpt={run}/\x1b[31mnothing", entry="eval")
    assert "\x1b" not in out + err


@pytest.mark.parametrize("which", ["middle", "first"])
def test_eval_knows_best_and_last(call, trained, which):
    status, _, err = call(f"ckpt={trained}", f"which={which}", entry="eval")
    assert status == 2 and "choose best or last" in err


def test_nothing_below_model_task_and_data_names_a_class():
    with pytest.raises(ConfigError, match="only model, task and data"):
        plain_config({"data": {"_target_": "ssmzoo.data.text.TextData", "corpus": {"_target_": "x"}}}, "here")
    with pytest.raises(ConfigError, match="only model, task and data"):
        build_node({"_target_": "ssmzoo.data.text.TextData", "corpus": {"_target_": "x"}}, "ssmzoo.data.")
    assert configuration.plain_config({"model": {"vocab_size": "${sizes:vocab_size}"}}, "here")


def test_a_run_says_which_backends_serve_and_warns_where_kernels_could_be_had(call, monkeypatch):
    import ssmzoo.ops
    from ssmzoo.ops.native import REBUILD
    from ssmzoo.train.report import backends_line

    assert "operators: " in call(*TINY, "trainer.max_steps=1")[1]
    rows = ssmzoo.ops.backend_table()
    without = [r for r in rows if r.backend in ("torch", "reference")]

    def said(reason):
        lost = type(rows[0])(rows[0].operator, "c", False, reason)
        monkeypatch.setattr(ssmzoo.ops, "backend_table", lambda: [lost, *without])
        return backends_line()

    for reason in (f"the kernels are not compiled; run `{REBUILD}`", "SSMZOO_NATIVE='avx9', expected one of avx2"):
        assert "by torch" in said(reason) and "warning: steps take several times longer" in said(reason)
        assert reason in said(reason)
    for reason in ("switched off by SSMZOO_NATIVE=off", "no c kernel for this operator"):
        assert "by torch" in said(reason) and "warning" not in said(reason)
    with ssmzoo.ops.backend("reference"):
        assert said("any") == "operators: all by reference, as SSMZOO_BACKEND asks"
