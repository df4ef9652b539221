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
INFERRED = [
    f for f in INFERRED if GoldenCase.load(f).params and f.stem != "train_step"
]  # it builds a task, not a class
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


def test_every_table_is_compared_with_its_class():
    assert TABLES.keys() == signatures().keys()


@pytest.mark.parametrize("name", signatures())
def test_the_tables_hold_every_official_argument_with_its_default(name):
    """None in a table: the tensors tell it, or nothing does what the argument asks for."""
    table, official = TABLES[name], signatures()[name]
    assert official.keys() <= set(table.names)
    for argument, default in official.items():
        ours = None if argument in table.required else table.default(argument)
        if argument in table.required or default == "required":
            assert ours is None and default in ("required", None), argument
        elif ours is not None:
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


def official_case(name: str, without: tuple[str, ...] = (), **more):
    """The module and its tensors of a stored case, without some of its arguments and with others."""
    case = GoldenCase.load(GOLDEN / f"{name}.json")
    given = {key: value for key, value in case.official_kwargs.items() if key not in without}
    return build(case.family, case.params, given | more)


def test_windows_of_a_language_model_turn_by_their_positions_only_where_that_is_asked_for():
    """GPT2Config has no rotary fraction of its own: left out, nothing turns."""
    for family in ("based", "jrt_rnn"):
        turned, still = (official_case(f"{family}/lm", *out)[0] for out in ((), (("rotary_emb_fraction",),)))
        assert [m.rope for m in turned.modules() if hasattr(m, "window")] == [True]
        assert [m.rope for m in still.modules() if hasattr(m, "window")] == [False]
        for refused in ({"rotary_emb_fraction": 0.5}, {"activation_function": "geglu"}, {"n_head_kv": 1}):
            with pytest.raises(ValueError, match=next(iter(refused))):
                official_case(f"{family}/lm", **refused)
    with pytest.raises(ValueError, match="'gelu_new', the class's own, is not here"):
        official_case("based/lm", ("activation_function",))
    with pytest.raises(TypeError, match="enc_length leaves no trace"):
        alone = {"_target_": "based.models.mixers.prefix_linear_attention.PrefixLinearAttention", "feature_dim": 4}
        official_case("jrt_rnn/lm", ("enc_length",), alt_mixer=alone | {"num_heads": 2})


def test_rotary_positions_stretch_behind_the_length_of_training():
    """Dynamic ones are Cheems' default: plain up to max_position_embeddings, behind it as transformers turns them."""
    plain, stretched = (official_case("cheems/lm", ("rope_scaling",) if s else ())[0] for s in (False, True))
    case = GoldenCase.load(GOLDEN / "cheems" / "lm.json")
    state = build("cheems", case.params, case.official_kwargs)[1]
    plain.load_state_dict(state)
    stretched.load_state_dict(state)
    n, p = stretched.stretch[1], stretched.layers[0].ssd.d_head
    short, long = torch.arange(n)[None] % 31, torch.arange(2 * n)[None] % 31
    assert torch.equal(plain(short), stretched(short)) and not torch.equal(plain(long), stretched(long))
    same = official_case("cheems/lm", rope_theta=10000.0 * (4.0 * 2 - 3) ** (p / (p - 2)))[0]
    same.load_state_dict(state)
    torch.testing.assert_close(same(long), stretched(long))
    with pytest.raises(ValueError, match="rope_scaling is of kind 'yarn'"):
        official_case("cheems/lm", rope_scaling={"rope_type": "yarn", "factor": 2.0})


def test_what_a_runner_gives_to_every_model_is_taken():
    runner = {"task": "parity_check", "norm_type": "layernorm", "mlp_size_mult": 1, "prenorm": True, "max_seq_len": 500}
    for name in ("sd_ssm/linear_query", "complex_diagonal_ssm/with_b_linear", "regular_rnn_baselines/lstm_2layer"):
        official_case(name, **runner)
    every = official_case("regular_rnn_baselines/elman_relu", return_all_outputs=True)[0]
    last = official_case("regular_rnn_baselines/elman_relu")[0]
    last.load_state_dict(every.state_dict())
    x = torch.randn(2, 6, 4)
    assert torch.equal(every(x)[:, -1], last(x)) and every(x).shape == (2, 6, 5)


def test_the_keys_of_the_papers_own_yaml_are_taken():
    case = GoldenCase.load(GOLDEN / "moe_mamba" / "lm.json")
    yaml = {"activation_type": "relu", "moe_inner_expert": "ff", "model_type": "gpt", "flash_attention": True}
    case.meta["official_kwargs"] = {k: v for k, v in case.official_kwargs.items() if k not in ("expert", "activation")}
    case.meta["official_kwargs"] |= yaml
    assert case.check()[0] < 1e-4
    with pytest.raises(TypeError, match="n_att_heads cannot be inferred"):
        official_case("moe_mamba/transformer_nopos", ("n_att_heads", "dhead"))


def test_a_folder_of_the_hub_whose_config_calls_itself_gpt2(tmp_path):
    """HazyResearch's files: GPT2Config's fields with the mixers, `model.` in front, counters and a table of decays."""
    from ssmzoo.released.load import load_official

    case = GoldenCase.load(GOLDEN / "based" / "lm.json")
    state = {f"model.{key}": value for key, value in case.params.items()}
    state |= {"train_metrics.num-tokens.count": torch.tensor(3), "model.transformer.decay.decay": torch.zeros(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = case.official_kwargs | {"model_type": "gpt2", "architectures": None, "summary_type": "cls_index"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = case.inputs["input_ids"]
    with torch.no_grad():
        got = load_official(tmp_path)(ids).logits
    assert relative_error(got, case.outputs["logits"]) < 1e-4
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 16}))
    with pytest.raises(CheckpointError, match="model_type 'gpt2'"):
        load_official(tmp_path)
