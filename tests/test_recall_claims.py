"""benchmarks/recall.py: every arm is a configuration that train.py takes, and the page judges whatever has been run."""

import hydra
import pytest
import recall
from omegaconf import OmegaConf
from recall_claims import CLAIMS, EXPERTS, SEARCH_SEED, SEEDS
from recall_page import write_page

from ssmzoo.presets import config_dir
from ssmzoo.train.config import check, free_overrides, paired_overrides, register_resolvers


@pytest.mark.parametrize("name", [name for name, claim in CLAIMS.items() if claim.arms])
def test_every_arm_is_a_configuration_that_training_takes(name, tmp_path):
    register_resolvers()
    claim = CLAIMS[name]
    jobs = [recall.Job(name, arm, 1e-3, SEARCH_SEED) for arm in claim.arms]
    assert len({job.name for job in jobs}) == len(jobs)
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        for job in jobs:
            words = recall.words_of(job, claim, tmp_path)
            cfg = hydra.compose("train", free_overrides(paired_overrides(words)))
            OmegaConf.set_struct(cfg, False)
            check(cfg)
            assert cfg.optim.lr == 1e-3 and cfg.seed == SEARCH_SEED and cfg.trainer.max_steps > 0


def row(claim, arm, lr, seed, i):
    cases = {"16x2": 0.9, "32x4": 0.5 + 0.01 * i}
    found = {"claim": claim, "arm": arm.name, "lr": lr, "seed": seed, "cpu_seconds": 9.0, "loss": 1 + lr, "steps": 100}
    losses = dict.fromkeys(("selective_copying_8", "infilling_3", "copying", "next_token"), 2.0)
    if claim == "birdie":
        found["told"] = losses | {"phone book 4x1": 0.1}
    elif claim in ("experts", "ten_million"):
        found |= {"curve": [[50, 2.0], [100, 1.5 - 0.01 * i]]}
    else:
        held = {case: 1000 * (i + 1) for case in cases}
        found |= {"cases": cases, "state_bytes": held, "trained": list(cases), "other_reading": cases}
    return {"key": recall.Job(claim, arm, lr, seed).key} | found


def test_rates_are_chosen_on_a_seed_of_their_own_before_the_others_are_trained():
    claim, results = CLAIMS["experts"], {}
    asked = [(job.arm.name, job.lr, job.seed) for job in recall.missing("experts", claim, SEEDS, results)]
    assert {seed for _, _, seed in asked} == {SEARCH_SEED} and len(set(asked)) == len(asked)
    for arm in claim.arms:
        for i, lr in enumerate(arm.rates):
            results[recall.Job("experts", arm, lr, SEARCH_SEED).key] = {"loss": -i}
    asked = list(recall.missing("experts", claim, (0, 1), results))
    assert [(j.arm.name, j.seed) for j in asked] == [(a.name, s) for s in (0, 1) for a in claim.arms]
    assert all(j.lr == j.arm.rates[-1] for j in asked)


def test_the_page_judges_every_claim_and_says_what_was_not_run(tmp_path):
    page = tmp_path / "recall.md"
    write_page([], page)
    assert page.read_text().startswith("# Recall")
    arms = [(name, arm, i) for name, claim in CLAIMS.items() for i, arm in enumerate(claim.arms)]
    rows = [row(name, arm, lr, SEARCH_SEED, i) for name, arm, i in arms for lr in arm.rates if len(arm.rates) > 1]
    tried = {r["key"]: r for r in rows}
    for name, arm, i in arms:
        if arm is not EXPERTS.arms[-1]:
            rows += [
                row(name, arm, recall.chosen_rate(name, arm, tried), s, i) for s in (0, 1) if s in CLAIMS[name].seeds
            ]
    times = {str(n): {"state_bytes": 1024 * n, "seconds": 1e-3} for n in (256, 1024)}
    rows.append({"key": "decoding", "claim": "decoding", "decoding": {arm.name: times for arm in EXPERTS.arms}})
    write_page(rows, page)
    text = page.read_text()
    assert text.count("\n## ") == 6 and text.count("(published") >= 8
    assert f"Not run: {EXPERTS.arms[-1].name}." in text and "nan" not in text
    assert all(
        (tmp_path / f"recall_{what}.png").stat().st_size > 0 for what in ("memory", "heat", "experts", "ten_million")
    )
