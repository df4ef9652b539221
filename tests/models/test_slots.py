"""Dicts among a model's arguments: whatever is built from one refuses an unknown key in one line with the nearest."""

import re
import typing
from collections.abc import Mapping

import pytest
import torch

import ssmzoo
from ssmzoo.models.hybrid import MIXERS
from ssmzoo.presets import model_class, read_model_config

BESIDE = {  # what else must be given, so that a model builds from this argument
    "attn_cfg": {"layer_pattern": "A"},
    "router_options": {"n_experts": 4},
}


def is_dict(hint) -> bool:
    kinds = [typing.get_origin(h) or h for h in (hint, *typing.get_args(hint))]
    return dict in kinds or Mapping in kinds


def slots() -> list[tuple[str, str]]:
    """(preset, argument) of every argument of every model class that is a dict."""
    found = {}
    for name in sorted(ssmzoo.list_models(), key=len):
        cls = model_class(read_model_config(name)["model"]["_target_"])
        for argument, hint in typing.get_type_hints(cls.__init__).items():
            if is_dict(hint):
                found.setdefault((cls, argument), (name, argument))
    return list(found.values())


SLOTS = slots()


def refusal(name: str, argument: str, key: str, **beside) -> str:
    given = {argument: {key: 1}} if argument != "mixers" else {"mixers": {beside["layer_pattern"]: {key: 1}}}
    with pytest.raises((ValueError, TypeError)) as error, torch.device("meta" if argument != "neck" else "cpu"):
        ssmzoo.create_model(name, **given, **beside)
    return str(error.value)


def check(name: str, argument: str, **beside):
    words = refusal(name, argument, "zzzzqq", **beside)
    assert "zzzzqq" in words and "\n" not in words and "nearest" not in words
    last = re.search(r"takes (.*)$", words).group(1).split(", ")[-1]
    words = refusal(name, argument, f"{last}_", **beside)
    assert f"{last}_" in words and re.search(rf"nearest: .*\b{last}\b", words), words


@pytest.mark.parametrize("name, argument", [slot for slot in SLOTS if slot[1] != "mixers"])
def test_an_unknown_key_of_a_slot_is_refused_with_the_nearest(name, argument):
    check(name, argument, **BESIDE.get(argument, {}))


@pytest.mark.parametrize("letter", MIXERS)
def test_an_unknown_argument_of_a_mixer_is_refused_with_the_nearest(letter):
    (name,) = [name for name, argument in SLOTS if argument == "mixers"]
    check(name, "mixers", layer_pattern=letter)


def test_there_are_slots():
    assert {argument for _, argument in SLOTS} >= {"ssm_cfg", "attn_cfg", "mixer", "mlp", "pkm", "neck", "mixers"}


def test_what_the_model_gives_itself_is_no_key_and_a_slot_is_a_dict():
    with pytest.raises(TypeError, match="ssm_cfg.d_model is unknown"):
        ssmzoo.create_model("mamba", ssm_cfg={"d_model": 8})
    with pytest.raises(TypeError, match="ssm_cfg is 3; expected arguments of Mamba by name"):
        ssmzoo.create_model("mamba", ssm_cfg=3)
    with pytest.raises(TypeError, match="attn_cfg.out_proj_bais is unknown; nearest: out_proj_bias"):
        ssmzoo.create_model("mamba", layer_pattern="MA", attn_cfg={"num_heads": 2, "out_proj_bais": False})
