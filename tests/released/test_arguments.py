"""Every argument of every official constructor: honoured, without effect, or refused; what is left out is
inferred from the tensors or takes the official class's default."""

import json

import pytest
import torch
from paths import GOLDEN

from ssmzoo.released.arguments import Arguments
from ssmzoo.released.family import families, find
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.golden import GoldenCase, relative_error
from ssmzoo.released.infer import LOOSE
from ssmzoo.released.load import build

TABLES = {f"{family}-{t.cls}": t for family in families("TABLES") for t in find(family, "TABLES")}
CASES = sorted(GOLDEN.glob("*/*.json"))
INFERRED = [f for f in CASES if find(f.parent.name, "infer") and find(f.parent.name, "official")]
INFERRED = [f for f in INFERRED if GoldenCase.load(f).params]
GIVEN = {
    "ngroups",
    "n_groups",
    "type",
    "learnable_init_states",
    "activation",
    "ssm_cfg",
    "attn_cfg",
    "block_modules",
    "pkm",
}  # no shape tells


def signatures() -> dict[str, dict]:
    """{class: {argument: default}} of the official classes, written down from their sources."""
    return json.loads((GOLDEN.parent / "released" / "official_defaults.json").read_text())


@pytest.mark.parametrize("name", TABLES)
def test_every_argument_has_one_place_and_a_reason(name):
    table = TABLES[name]
    assert len(set(table.names)) == len(table.names)
    assert all(len(why) > 4 for _, why in (table.inert | table.refused).values())
    for argument, (default, _) in table.refused.items():
        given = dict.fromkeys(table.required, 1)
        table.complete(given | {argument: default})
        with pytest.raises(ValueError, match=argument):
            table.complete(given | {argument: "something else"})
    with pytest.raises(TypeError, match="takes no argument 'no_such_thing'"):
        table.complete({"no_such_thing": 1})


@pytest.mark.parametrize("name", signatures())
def test_the_tables_hold_every_official_argument_with_its_default(name):
    table, official = TABLES[name], signatures()[name]
    assert official.keys() <= set(table.names)
    for argument, default in official.items():
        if argument in table.required:
            assert default == "required"
        elif table.default(argument) is not None:  # None: the tensors say it, where the official default is the same
            ours = table.default(argument)
            assert (list(ours) if isinstance(ours, tuple) else ours) == default, argument


@pytest.mark.parametrize("name", [n for n in TABLES if n.endswith("ForCausalLM") and "cheems" not in n])
def test_the_tables_are_those_of_the_installed_transformers(name):
    from ssmzoo._torchvision import make_importable

    make_importable()
    transformers = pytest.importorskip("transformers")
    table = TABLES[name]
    official = getattr(transformers, table.cls.replace("ForCausalLM", "Config"))()
    for argument in {*table.honoured, *table.inert, *table.refused} & official.to_dict().keys():
        ours, theirs = table.default(argument), getattr(official, argument)
        derived = argument in ("time_step_rank", "intermediate_size")  # "auto" and 2 hidden_size, as numbers there
        assert (
            derived
            or ours is None
            or (list(ours) if isinstance(ours, tuple) else ours)
            == (list(theirs) if isinstance(theirs, tuple) else theirs)
        ), argument
    own = set(official.to_dict()) - set(transformers.PreTrainedConfig().to_dict())
    assert own - set(table.names) - {"layer_types", "model_type"} == set()


def test_a_sliding_window_left_out_is_the_classes_own():
    """128 // 2 keys before the token, no rotary positions, and the biases that the file has."""
    from ssmzoo.models.based import BasedLM  # noqa: F401  the family's classes are importable
    from ssmzoo.released.load import load_official

    state = {"Wqkv.weight": torch.randn(24, 8), "out_proj.weight": torch.randn(8, 8)}
    model = load_official("based", state, num_heads=2)
    assert (model.window, model.rope) == (65, False)
    with pytest.raises(TypeError, match="num_heads cannot be inferred"):
        load_official("based", state)
    with pytest.raises(ValueError, match="softmax_scale=0.5"):
        load_official("based", state, num_heads=2, softmax_scale=0.5)


@pytest.mark.parametrize("file", INFERRED, ids=[f"{f.parent.name}/{f.stem}" for f in INFERRED])
def test_what_the_tensors_tell_need_not_be_given(file):
    """Without the arguments that the file tells, the outputs are the official ones."""
    case = GoldenCase.load(file)
    inferred = find(case.family, "infer")(case.params, case.official_kwargs)
    assert inferred
    kept = {k: v for k, v in case.official_kwargs.items() if k not in inferred or k in GIVEN}
    lists = {k: v for k, v in case.official_kwargs.items() if k == "img_size" and isinstance(v, list)}
    case.meta["official_kwargs"] = kept | lists | ({"n_layer": inferred["n_layer"]} if "n_layer" in inferred else {})
    outputs, _ = case.check()
    assert outputs < 1e-4


@pytest.mark.parametrize("file", INFERRED, ids=[f"{f.parent.name}/{f.stem}" for f in INFERRED])
def test_an_argument_that_contradicts_the_tensors_is_named(file):
    case = GoldenCase.load(file)
    inferred = find(case.family, "infer")(case.params, case.official_kwargs)
    name = next(k for k, v in inferred.items() if type(v) is int and k not in LOOSE | GIVEN)
    with pytest.raises(CheckpointError, match=f"{name} is {inferred[name] + 1}, but the tensors say {inferred[name]}"):
        build(case.family, case.params, case.official_kwargs | {name: inferred[name] + 1})


def used(case: GoldenCase) -> Arguments | None:
    """The table of the official class that a case was computed with."""
    tables = [t for t in find(case.family, "TABLES") or () if t.cls.split()[0] in str(case.meta.get("official_class"))]
    tables = [t for t in tables if set(case.official_kwargs) <= set(t.names)]
    return tables[0] if tables else None


def twice(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return 2 * value if isinstance(value, (int, float)) else value


@pytest.mark.parametrize("file", INFERRED, ids=[f"{f.parent.name}/{f.stem}" for f in INFERRED])
def test_arguments_without_effect_have_none(file):
    case = GoldenCase.load(file)
    table = used(case)
    if table is None or not table.inert:
        pytest.skip("no table of its own, or nothing without effect")
    other = {
        n: not d if isinstance(d, bool) else 2 * d if isinstance(d, (int, float)) else d
        for n, (d, _) in table.inert.items()
    }
    case.meta["official_kwargs"] = {
        n: v for n, v in other.items() if n != "learnable_init_states"
    } | case.official_kwargs
    outputs, gradients = case.check()
    assert outputs < 1e-4 and (gradients is None or gradients < 1e-4)


def test_what_is_asked_for_by_name():
    with pytest.raises(CheckpointError, match=r"img_size must be given as \(height, width\)"):
        case = GoldenCase.load(GOLDEN / "vim" / "classifier_midcls.json")
        build("vim", case.params, {k: v for k, v in case.official_kwargs.items() if k != "img_size"})
    with pytest.raises(TypeError, match="n_layer cannot be inferred from the tensors"):
        TABLES["mamba-MixerModel"].complete({"d_model": 8, "d_intermediate": 0, "vocab_size": 8})


def test_relative_error_is_that_of_verify():
    assert relative_error(torch.ones(3), torch.ones(3)) == 0
