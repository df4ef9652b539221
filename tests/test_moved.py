"""What earlier releases called otherwise still works: modules, targets of checkpoints, arguments."""

import importlib
import inspect
import sys

import pytest
import torch

import ssmzoo.train.checkpoint
import ssmzoo.zoo
from ssmzoo.moved import MODULES
from ssmzoo.presets import build_model, model_class


@pytest.mark.parametrize("old", MODULES)
def test_old_module_names_import_the_new_module(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MODULES[old]}"):
        found = importlib.import_module(old)
    assert found is importlib.import_module(MODULES[old])


@pytest.mark.parametrize("module", [ssmzoo.zoo, ssmzoo.train.checkpoint], ids=lambda module: module.__name__)
def test_old_names_of_functions_give_those_of_their_new_home(module):
    homes = inspect.getclosurevars(module.__getattr__).nonlocals["homes"]
    for name, home in homes.items():
        assert name not in vars(module)  # else nothing would warn
        with pytest.warns(DeprecationWarning, match=f"{module.__name__}.{name} is now {home}.{name}") as found:
            assert getattr(module, name) is getattr(importlib.import_module(home), name)
        assert found[0].filename == __file__
    with pytest.raises(AttributeError, match="no attribute 'misspelt'"):
        getattr(module, "misspelt")  # noqa: B009


def test_targets_of_earlier_checkpoints():
    assert model_class("ssmzoo.models.mamba_reorder.ReorderedMamba").__module__ == "ssmzoo.models.token_dynamics"
    assert model_class("ssmzoo.models.mamba_scenario.ScenarioMambaLM").__name__ == "ScenarioMambaLM"


def test_a_scenario_among_the_mixers_arguments_is_the_scenario_model():
    sizes = {"vocab_size": 16, "d_model": 16, "n_layer": 2}
    nodes = (
        {"_target_": "ssmzoo.models.mamba.MambaLM", "ssm_cfg": {"scenario": "mixed", "d_state": 4}},
        {"_target_": "ssmzoo.models.mamba_scenario.ScenarioMambaLM", "scenario": "mixed", "ssm_cfg": {"d_state": 4}},
    )
    states = []
    for node in nodes:
        torch.manual_seed(0)
        states.append(build_model(node | sizes).state_dict())
    assert any("parametrizations" in key for key in states[0])
    torch.testing.assert_close(*states, rtol=0, atol=0)
