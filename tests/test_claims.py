"""benchmarks/claims.py: which runs it asks for, that nothing is repeated, its page and its verdicts."""

import json
import math

import claims
import pytest
from claims_list import CLAIMS, SCRIPTS, against, ahead
from claims_page import write_page
from paths import ROOT


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Every call of train.py, answered by a run folder whose score is best at the middle rate."""
    asked = []

    def fake(command, log, left):
        words = dict(w.split("=", 1) for w in command if "=" in w)
        asked.append(words)
        folder = tmp_path / "runs" / "model" / words["name"]
        (folder / "checkpoints" / "last").mkdir(parents=True)
        score = 0.9 - 0.1 * abs(math.log2(float(words["optim.lr"]) / 2e-3)) + 0.001 * int(words["seed"])
        (folder / "metrics.csv").write_text(f"step,val/top1\n110,0.1\n220,{score}\n")
        (folder / "status.txt").write_text("finished")
        return 20.0

    monkeypatch.setattr(claims, "train_in_fork", fake)
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "claims.json")
    return asked


def test_rates_on_a_seed_of_their_own_then_the_seeds_and_nothing_twice(trained, tmp_path, capsys):
    claim = CLAIMS["res_vmamba"]
    claims.run([claim], tmp_path / "runs", 1e9)
    assert len(trained) == 3 * (3 + 3)  # arms x (rates + seeds)
    first = trained[:6]
    assert [w["seed"] for w in first] == ["100"] * 3 + ["0", "1", "2"]
    assert [w["optim.lr"] for w in first] == ["0.001", "0.002", "0.004", "0.002", "0.002", "0.002"]
    assert first[0]["model.fuse"] == "learned" and first[0]["trainer.max_steps"] == "220"
    known = json.loads((tmp_path / "claims.json").read_text())
    assert known["res_vmamba"]["fuse none"]["2"]["value"] == pytest.approx(90.2) and len(known["res_vmamba"]) == 3
    claims.run([claim], tmp_path / "runs", 1e9)
    assert len(trained) == 18
    (tmp_path / "claims.json").unlink()  # results come back from the run folders
    claims.run([claim], tmp_path / "runs", 1e9)
    assert len(trained) == 18 and json.loads((tmp_path / "claims.json").read_text()) == known


def test_a_budget_ends_between_and_within_runs(trained, tmp_path, capsys):
    claims.run([CLAIMS["res_vmamba"]], tmp_path / "runs", 0)
    assert not trained and "0 minutes are over" in capsys.readouterr().out
    folder = tmp_path / "runs/model/res_vmamba-fuse-learned-0.001-seed100"
    (folder / "checkpoints" / "last").mkdir(parents=True)
    (folder / "status.txt").write_text("stopped")
    with pytest.raises(KeyError):  # the fake wants a name; a resumed run is asked for by its folder alone
        claims.run([CLAIMS["res_vmamba"]], tmp_path / "runs", 1)
    assert trained[-1] == {"resume": str(folder)}


def test_the_page_says_what_is_missing_and_judges_what_is_whole(tmp_path):
    rows = {
        arm.name: {str(s): {"value": 90 + i + 0.1 * s, "cpu_seconds": 20.0, "lr": 2e-3} for s in range(3)}
        for i, arm in enumerate(CLAIMS["res_vmamba"].arms)
    }
    page = write_page({"res_vmamba": rows}, tmp_path).read_text()
    assert "| fuse learned | 90.1 ± 0.1 | 0.002 | 0, 1, 2 | 20 |" in page
    assert "**Does not hold here: the other way round (fuse learned 90.1, fuse none 92.1).**" in page
    assert "not tried yet" in page and "Not enough arms are tried yet" in page
    assert (tmp_path / "claims_res_vmamba.png").stat().st_size > 3000
    assert not (tmp_path / "claims_patch_scaling.png").exists()
    page = write_page({"res_vmamba": {k: v for k, v in rows.items() if k != "fuse random"}}, tmp_path).read_text()
    assert "fuse none 92.1); not all arms are tried yet.**" in page
    page = write_page({"res_vmamba": {k: v for k, v in rows.items() if k != "fuse none"}}, tmp_path).read_text()
    assert "**Not all arms are tried yet.**" in page


def test_verdicts():
    judge = against("a", "b", "a helps")
    assert judge({"a": (5, 0.1), "b": (4, 0.1)}).startswith("holds here: a helps")
    assert judge({"a": (4, 0.1), "b": (5, 0.1)}).startswith("does not hold here")
    assert judge({"a": (5, 0.6), "b": (4, 0.6)}).startswith("undecided here")
    first = ahead("a", "a is ahead")
    assert first({"a": (5, 0.1), "b": (4, 0.1), "c": (3, 0.1)}).startswith("holds here: a is ahead")
    assert first({"a": (5, 0.1), "b": (4.9, 0.1), "c": (3, 0.1)}).startswith(
        "holds in part here: a is ahead of c, within"
    )
    assert first({"a": (5, 0.1), "b": (6, 0.1)}).startswith("does not hold here: a is behind b")


@pytest.mark.parametrize("name", CLAIMS)
def test_every_arm_is_a_configuration_that_composes(name, tmp_path):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from ssmzoo.presets import config_dir
    from ssmzoo.train.config import check, free_overrides, paired_overrides, register_resolvers

    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        arms = {
            tuple(w if w.startswith("model=") else w.partition("=")[0] for w in arm.overrides): arm
            for arm in CLAIMS[name].arms
        }
        for arm in arms.values():  # one for every set of keys
            words = [word.replace("{data}", str(tmp_path)) for word in (*CLAIMS[name].common, *arm.overrides)]
            typed = free_overrides(paired_overrides(words))
            cfg = compose("train", typed)
            OmegaConf.set_struct(cfg, False)
            check(cfg)
    means = {arm.name: (float(i), 0.1) for i, arm in enumerate(CLAIMS[name].arms)}
    assert any(word in CLAIMS[name].verdict(means) for word in ("here", "this budget"))


def test_scripts_that_are_called_exist():
    assert all((ROOT / script.command[0]).exists() for script in SCRIPTS.values())


def test_the_page_of_explanations_judges_what_there_is(tmp_path):
    from explanations_page import write_page as explanations

    known = json.loads((ROOT / "docs/results/explanations.json").read_text())
    page = explanations(known, tmp_path).read_text()
    assert "MambaLRP's claim" in page and "| digits: Vim (" in page
    assert explanations([], tmp_path) is None


def test_files_of_a_claim_are_made_once_and_named_to_its_runs(trained, tmp_path, monkeypatch):
    made = []

    def prepare(folder):
        made.append(folder)
        folder.mkdir(parents=True)

    claim = CLAIMS["data_selection"]._replace(prepare=prepare, measure=CLAIMS["res_vmamba"].measure, arms=())
    for arm in CLAIMS["data_selection"].arms[:2]:
        claims.train(claim, arm, 2e-3, 0, tmp_path / "runs", math.inf)
    assert len(made) == 1
    assert trained[0]["data.path"] == f"{tmp_path}/runs/data/data_selection/pool"
    assert trained[1]["data.selection.target"] == f"{tmp_path}/runs/data/data_selection/target"


def test_a_claim_whose_files_cannot_be_had_is_left_out_in_a_line(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no npm there
    claims.run([CLAIMS["res_vmamba_cifar10"], CLAIMS["res_vmamba"]], tmp_path / "runs", 1e9)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "npm and a network" in line] == said[:1]  # once, not for every arm
    assert len(trained) == 18 and list(json.loads((tmp_path / "claims.json").read_text())) == ["res_vmamba"]


def test_rates_of_another_claim_are_taken_unless_some_were_chosen(trained, tmp_path):
    claim = CLAIMS["res_vmamba"]
    arm, other = claim.arms[0], claim._replace(name="other", rates_of="res_vmamba")
    (tmp_path / "claims.json").write_text(json.dumps({"res_vmamba": {arm.name: {"0": {"value": 1.0, "lr": 7e-3}}}}))
    claims.run([other._replace(arms=(arm,))], tmp_path / "runs", 1e9)
    assert [w["optim.lr"] for w in trained] == ["0.007"] * 3
    claims.run([other._replace(name="chosen", rates_of=None, arms=(arm,))], tmp_path / "runs", 1e9)
    assert [w["seed"] for w in trained[3:6]] == ["100"] * 3


def test_the_page_of_regular_languages_is_that_of_its_results(monkeypatch):
    import regular_languages as page

    assert page.PAGE.read_text(encoding="utf-8") == page.page()
    monkeypatch.setattr(page, "load", dict)
    assert page.page().count("not tried yet") == len(page.CELLS) * len(page.MODELS)


def test_regular_languages_go_on_with_what_is_missing(tmp_path, monkeypatch):
    import regular_languages as bench

    def finished(words, runs, name, until):
        asked.append(name)
        (tmp_path / "config.yaml").write_text("trainer: {max_steps: 1500}")
        rows = "".join(f"{length},8,{8 if length < 60 else 4},1\n" for length in range(1, 501, 2))
        (tmp_path / "lengths.csv").write_text("length,strings,right,accuracy\n" + rows)
        return tmp_path, 3.4

    asked = []
    for name, value in dict(finished=finished, **{n: tmp_path / n for n in ("RESULTS", "PAGE", "FIGURE")}).items():
        monkeypatch.setattr(bench, name, value)
    command = ["regular_languages.py", "--models", "lstm,mamba", "--cells", "d4", "--seeds", "0,1"]
    for seeds in (["--seeds", "0"], ["--seeds", "0,1"]):
        monkeypatch.setattr("sys.argv", command + seeds)
        bench.main()
    assert asked == ["lstm-d4-seed0", "mamba-d4-seed0", "lstm-d4-seed1", "mamba-d4-seed1"]
    found = bench.load()["lstm"]["d4"]["1"]
    assert found["first"] == 61 and found["lowest"] == 50 and len(found["curve"]) == len(bench.LENGTHS)
    assert "| d4 | not tried yet | 52.2 ± 0.0 (2 seeds) |" in bench.PAGE.read_text()
    monkeypatch.setattr("sys.argv", ["regular_languages.py", "--cells", "d5"])
    with pytest.raises(SystemExit):
        bench.main()
