"""Every entry of every family's catalogue: facts of the right form, and arguments that build its preset's tensors."""

import re

import pytest
import torch

from ssmzoo.presets import build_preset, config_names
from ssmzoo.released import catalogue as weights
from ssmzoo.released import language, mambair_v2
from ssmzoo.released.family import families, find, to_official
from ssmzoo.released.load import argument_names, build

ENTRIES = weights.catalogue()


def test_every_family_with_published_files_is_there():
    assert set(families("CATALOGUE")) == {entry.family for entry in ENTRIES.values()}
    assert len(ENTRIES) > 60 and {"mamba", "vmamba", "vim", "mambair", "mambair_v2"} <= set(families("CATALOGUE"))


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_states_facts_of_the_right_form(name):
    entry = ENTRIES[name]
    assert entry.preset in config_names("model")
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.bytes is None or entry.bytes > 1000
    assert set(entry.arguments) <= set(argument_names(entry.family))
    source = entry.source
    if isinstance(source, weights.Hub):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo) and re.fullmatch("main|[0-9a-f]{40}", source.revision)
    elif isinstance(source, weights.Asset):
        assert source.url.startswith("https://") and "#" not in source.url
    else:
        assert source.link.startswith("https://") and source.todo
    assert weights.split_name(name) == (entry.preset, entry.tag)
    assert weights.find_weights(entry.preset, entry.tag) is entry


def on_cpu(function):
    """For what is computed and compared by value."""

    def call(*args):
        with torch.device("cpu"):
            return function(*args)

    return call


def build_of(name):
    entry = ENTRIES[name]
    return entry.family, entry.preset, entry.model, entry.arguments


# one entry of those that differ in the file alone
BUILDS = [name for i, name in enumerate(ENTRIES) if build_of(name) not in map(build_of, list(ENTRIES)[:i])]


@pytest.mark.parametrize("name", BUILDS)
def test_official_arguments_build_the_tensors_of_the_preset(name, monkeypatch):
    entry = ENTRIES[name]
    monkeypatch.setattr(language, "same_head", lambda state, head, embedding: head not in state or tied)
    monkeypatch.setattr(mambair_v2, "relative_position_index", on_cpu(mambair_v2.relative_position_index))
    with torch.device("meta"):
        model = build_preset(entry.preset, **entry.model)
        tied = hasattr(model, "lm_head") and model.lm_head.weight is model.backbone.embedding.weight
        state = to_official(entry.family, model)
        official, _ = build(entry.family, dict(state), dict(entry.arguments))
        convert = find(entry.family, "from_official")
        ours = convert(model, dict(state)) if convert else state
    own = {key: value.shape for key, value in model.state_dict().items()}
    assert isinstance(official, type(model))
    assert {key: value.shape for key, value in official.state_dict().items()} == own
    assert {key: value.shape for key, value in ours.items()} == own


PUBLISHED = {  # parameters; MambaVision's by its released classes, which the paper rounds to 31.8, 35.1, ... 739.6 M
    "mamba_vision_tiny": 31_794_248,
    "mamba_vision_tiny2": 35_104_008,
    "mamba_vision_small": 50_140_584,
    "mamba_vision_base": 97_685_288,
    "mamba_vision_large": 227_961_048,
    "mamba_vision_large2": 241_554_824,
    "mamba_vision_large2_512": 241_554_824,
    "mamba_vision_large3": 739_570_472,
    "mamba_vision_large3_512": 739_570_472,
    "mamba3_mimo_187m": 187_291_968,
    "adventurer_base_patch8_448": 100_473_160,
    "mamba_reg_base": 99_301_096,
    "vmamba_tiny": 30_249_064,
    "vim_tiny_plus": 7_250_344,
    "mambair_light_x2": 905_016,
    "mambair_v2_light_x2": 774_092,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_preset(name).parameters()) == PUBLISHED[name]


def test_a_16_bit_file_weighs_two_bytes_for_each_parameter():
    for name in ("mamba3_siso_187m", "mamba2_2.7b"):
        with torch.device("meta"):
            model = build_preset(name)
        rest = ENTRIES[name].bytes - 2 * sum(p.numel() for p in model.parameters())
        assert 0 < rest < 1000 * len(model.state_dict())


def test_no_tag_and_wrong_tags_are_refused_with_the_right_ones():
    with pytest.raises(ValueError, match="choose one: mambair_denoise.sigma15, mambair_denoise.sigma25"):
        weights.find_weights("mambair_denoise", True)
    with pytest.raises(ValueError, match="no released file 'sigma26'; nearest: sigma25"):
        weights.find_weights("mambair_denoise", "sigma26")
    with pytest.raises(ValueError, match="no released weights are known for 'mamba_100m'"):
        weights.find_weights("mamba_100m", True)
    assert weights.find_weights("mamba_2.8b", True).tag == "" and weights.find_weights("mamba_2.8b", "slimpj")
