"""experiment=pattern_search: what it composes, equal parameters of its stripes, and loss against bytes of state."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ssmzoo.cli.runs import cache_point, cache_table
from ssmzoo.presets import build_model, config_dir
from ssmzoo.safe_yaml import read_yaml
from ssmzoo.train import config as configuration


def test_every_stripe_of_the_search_has_as_many_parameters():
    configuration.register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ["experiment=pattern_search"])
    optuna = read_yaml(config_dir() / "hparams_search" / "patterns.yaml")["hydra"]["sweeper"]["params"]
    stripes = optuna["model.layer_pattern"].removeprefix("choice(").removesuffix(")").split(",")
    assert len(stripes) > 15
    model = OmegaConf.to_container(cfg.model, resolve=False) | {"vocab_size": 256}
    for stripe in set(stripes):
        count = sum(p.numel() for p in build_model(model | {"layer_pattern": stripe}).parameters())
        assert abs(count / cfg.model.parameters - 1) < 0.005, stripe


def test_the_least_state_for_a_loss_is_marked():
    points = {"A": [(900.0, 1.0), (900.0, 1.2)], "M": [(100.0, 1.3)], "S": [(400.0, 1.4)]}
    lines = cache_table(points).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["M", "S", "A"]
    assert [line.endswith("*") for line in lines[1:4]] == [True, False, True] and "1.1000" in lines[3]


def test_a_damaged_file_is_named(tmp_path):
    file = tmp_path / "state.csv"
    assert cache_point(file) is None
    file.write_text("length,state_bytes,parameters,loss\n64,1000,5,1.25\n")
    assert cache_point(file) == (1000, 1.25)
    file.write_text("something\nelse\n")
    with pytest.raises(ValueError, match=r"state.csv does not hold state_bytes and loss"):
        cache_point(file)
