"""Loading takes every tensor or refuses: heads, embeddings and norms never stay random; config.json is read whole."""

import json
import warnings

import pytest
import torch
from paths import GOLDEN
from safetensors.torch import save_file

import ssmzoo
from ssmzoo.checkpoint_files import read_weights
from ssmzoo.models.mambatalk import MambaTalk
from ssmzoo.released.family import families, to_official
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.fit import role
from ssmzoo.released.golden import GoldenCase, relative_error
from ssmzoo.train.init_from import start_from

TINY = {  # small enough to build in no time, by family; every family with models of ours is here
    "mamba": lambda: ssmzoo.create_model("mamba", vocab_size=64, d_model=32, n_layer=2),
    "mamba_hf": lambda: ssmzoo.create_model("mamba", vocab_size=64, d_model=32, n_layer=2),
    "mamba2": lambda: ssmzoo.create_model("mamba2", vocab_size=64, d_model=64, n_layer=2),
    "mamba2_hf": lambda: ssmzoo.create_model("mamba2", vocab_size=64, d_model=64, n_layer=2),
    "mamba3": lambda: ssmzoo.create_model("mamba3", vocab_size=64, d_model=64, n_layer=1),
    "moe_mamba": lambda: ssmzoo.create_model("moe_mamba", vocab_size=32, d_model=16, n_blocks=2, n_experts=2),
    "based": lambda: ssmzoo.create_model("based", vocab_size=32, d_model=16, n_heads=2, d_ff=8, feature_dim=2),
    "jrt_rnn": lambda: ssmzoo.create_model("jrt_rnn", vocab_size=31, d_model=16, n_heads=2, d_ff=8, feature_dim=2),
    "cheems": lambda: ssmzoo.create_model(
        "cheems", vocab_size=32, d_model=32, n_layer=2, n_heads=2, d_ff=16, n_experts=16, d_retrieval=8
    ),
    "hydra_lm": lambda: ssmzoo.create_model("hydra_lm_toy", vocab_size=32, d_model=16, n_layer=2, pkm=None),
    "vmamba": lambda: ssmzoo.create_model("vmamba_tiny", depths=[1, 1], dims=[8, 16], num_classes=3),
    "res_vmamba": lambda: ssmzoo.create_model("res_vmamba_small", depths=[1, 1], dims=[8, 16], num_classes=3),
    "vim": lambda: ssmzoo.create_model("vim_tiny", depth=2, embed_dim=16, img_size=32, num_classes=3),
    "shuffle_mamba": lambda: ssmzoo.create_model(
        "shuffle_mamba_reg_small", depth=2, embed_dim=24, img_size=32, num_classes=3
    ),
    "adventurer": lambda: ssmzoo.create_model("adventurer_tiny", depth=2, embed_dim=64, img_size=32, num_classes=3),
    "mamba_vision": lambda: ssmzoo.create_model("mamba_vision_base", depths=[1, 1, 2, 1], embed_dim=8, num_classes=3),
    "spatial_mamba": lambda: ssmzoo.create_model("spatial_mamba_tiny", depths=[1, 1], embed_dim=8, num_classes=3),
    "sd_ssm": lambda: ssmzoo.create_model("sd_ssm", input_size=3, num_classes=4, state_size=6),
    "complex_diagonal_ssm": lambda: ssmzoo.create_model(
        "complex_diagonal_ssm", input_size=3, num_classes=4, state_size=6
    ),
    "regular_rnn_baselines": lambda: ssmzoo.create_model("lstm", input_size=3, num_classes=4, state_size=6),
    "mambair": lambda: ssmzoo.create_model("mambair_light_x2", embed_dim=30, depths=[1, 1]),
    "mambair_v2": lambda: ssmzoo.create_model("mambair_v2_light_x2", depths=[1, 1], num_heads=[2, 2], embed_dim=16),
    "maat": lambda: ssmzoo.create_model("maat", enc_in=3, d_model=16, n_heads=2, e_layers=1, d_ff=16),
    "mambatalk": lambda: MambaTalk(pose_dims=15, frames=6, d_model=16, audio_dim=16, motion_dim=12, codes=10, words=13),
}
FOREIGN_KEYS = {
    "blocks.0.att.time_decay": "RWKV",
    "model.layers.0.self_attn.q_proj.weight": "a Llama or one of its relatives",
    "transformer.h.0.attn.c_attn.weight": "GPT-2",
    "blocks.0.attn.qkv.weight": "a vision Transformer",
    "layers.0.blocks.0.attn.relative_position_bias_table": "a Swin Transformer",
    "layer1.0.conv1.weight": "a ResNet",
}
INFERRED = sorted(set(families("MODELS")) & set(families("TELLING_KEYS")) - {"mamba_fscil"})


def test_every_family_of_models_is_tried():
    assert INFERRED == sorted(TINY)


@pytest.mark.parametrize("family", INFERRED)
def test_a_model_starts_from_its_weights_under_official_names(family, tmp_path):
    torch.manual_seed(0)
    source, target = TINY[family](), TINY[family]()
    torch.save(to_official(family, source), tmp_path / "w.pth")
    said = start_from(target, str(tmp_path / "w.pth"))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values())), said
    assert "new" not in said and "not used" not in said


@pytest.mark.parametrize("family", INFERRED)
def test_no_embedding_head_or_norm_starts_from_random_values_unsaid(family, tmp_path):
    """Each tensor of these roles in turn is taken out of the file: a refusal that names it, or what is said is new."""
    model, seen = TINY[family](), set()
    state = model.state_dict()
    for name in state:
        kind = role(model, name) if len(seen) < 3 else ""
        if kind in ("", *seen) or name == "lm_head.weight":
            continue
        seen.add(kind)
        save_file(
            {k: v.clone() for k, v in state.items() if k not in (name, "lm_head.weight")}, tmp_path / "w.safetensors"
        )
        with pytest.raises(CheckpointError, match=f"{name.split('.')[-1]}|only .* of the model's"):
            start_from(TINY[family](), str(tmp_path / "w.safetensors"))
    assert seen or family in ("complex_diagonal_ssm", "regular_rnn_baselines")  # they have linear layers only


def test_a_head_for_other_classes_stays_new_and_is_said_with_its_share(tmp_path):
    torch.save({"model": TINY["vmamba"]().state_dict()}, tmp_path / "w.pth")
    other = ssmzoo.create_model("vmamba_tiny", depths=[1, 1], dims=[8, 16], num_classes=5)
    said = start_from(other, str(tmp_path / "w.pth"))
    assert "new: head.weight, head.bias (" in said and "% of its parameters)" in said
    wide = ssmzoo.create_model("mamba", vocab_size=72, d_model=32, n_layer=2)
    torch.save(TINY["mamba"]().state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"embedding\) is \(64, 32\) in the file and \(72, 32\) in the model"):
        start_from(wide, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "mamba_hf", "mamba2_hf"])
@pytest.mark.parametrize("asked", [None, True, False])
def test_a_head_of_its_own_is_loaded_or_refused(family, asked):
    torch.manual_seed(0)
    model = ssmzoo.create_model(family.removesuffix("_hf"), vocab_size=64, d_model=64, n_layer=1, tie_embeddings=False)
    state = to_official(family, model)
    name = "tie_word_embeddings" if family.endswith("_hf") else "tie_embeddings"
    kwargs = {} if asked is None else {name: asked}
    kwargs |= {"n_groups": 1} if family == "mamba2_hf" else {}
    if asked:
        with pytest.raises(CheckpointError, match=f"{name} is True, but lm_head.weight of the file is not"):
            ssmzoo.load_official(family, state, **kwargs)
        return
    ids = torch.randint(64, (2, 7))
    assert torch.equal(ssmzoo.load_official(family, state, **kwargs)(ids).logits, model.eval()(ids).logits)


def folder(tmp_path, config, family="mamba_hf"):
    save_file(to_official(family, TINY[family]()), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


HF = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def test_config_json_says_which_family_it_is(tmp_path):
    load = ssmzoo.load_official
    assert type(load(folder(tmp_path, HF))) is type(load("mamba_hf", tmp_path))
    with pytest.raises(CheckpointError, match="describes a model of family 'mamba_hf', not of 'mamba'"):
        load("mamba", tmp_path)
    unknown = HF | {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"]}
    for words, config in (
        ("model_type 'rwkv7' .RWKV7ForCausalLM., which is none of", unknown),
        ("sets mixer_rms_eps, which family 'mamba_hf' does not know", HF | {"mixer_rms_eps": 1e-6}),
        ("hidden_size is 48, but the tensors say 32", HF | {"hidden_size": 48}),
    ):
        with pytest.raises(CheckpointError, match=words):
            load(folder(tmp_path, config))
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config.json (cannot be read|does not hold)"):
            load(tmp_path)


def test_infinity_in_every_form_that_transformers_writes(tmp_path):
    config = {
        "model_type": "mamba2",
        "n_groups": 1,
        "tie_word_embeddings": True,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    module = ssmzoo.load_official(folder(tmp_path, config, "mamba2_hf"))
    assert module.backbone.layers[0].mixer.dt_limit == (0.0, float("inf"))
    folder(tmp_path, config | {"time_step_limit": [0.0, float("inf")]}, "mamba2_hf")
    assert ssmzoo.load_official(tmp_path).backbone.layers[0].mixer.dt_limit == (0.0, float("inf"))


def test_half_precision_is_said(tmp_path):
    state = {k: v.bfloat16() for k, v in TINY["mamba"]().state_dict().items()}
    with pytest.warns(UserWarning, match="stores bfloat16, the model computes in float32"):
        ssmzoo.load_official("mamba", state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ssmzoo.load_official("mamba", TINY["mamba"]().state_dict())


def test_an_unknown_checkpoint_is_no_random_model(tmp_path):
    with pytest.raises(CheckpointError, match="no family has keys like a.weight"):
        ssmzoo.load_official({"a.weight": torch.zeros(2)})
    for key, name in FOREIGN_KEYS.items():
        with pytest.raises(CheckpointError, match=f"by .* it looks like {name}, which the zoo does not have; name one"):
            ssmzoo.load_official({"some.bias": torch.zeros(2), key: torch.zeros(2)})
    with pytest.raises(ValueError, match="unknown family 'mamab'"):
        ssmzoo.load_official("mamab", {})
    assert read_weights(folder(tmp_path, HF)).keys() == to_official("mamba_hf", TINY["mamba_hf"]()).keys()


@pytest.mark.parametrize("family", INFERRED)
def test_info_says_what_a_file_is(family, tmp_path, capsys):
    from ssmzoo.cli.main import main

    torch.save({"model": to_official(family, TINY[family]()), "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(tmp_path / "w.pth")])
    out = capsys.readouterr().out
    assert f"w.pth: {family}\n" in out and "taken from   model" in out and "epoch 3" in out
    assert f"ssmzoo.load_official('{family}'" in out


def test_both_routes_take_the_same_weights_of_one_file(tmp_path):
    timm = pytest.importorskip("timm")
    import ssmzoo.timm  # noqa: F401

    small = dict(depths=[1, 1], dims=[8, 16], num_classes=3)
    released = ssmzoo.create_model("vmamba_tiny", **small)
    state = to_official("vmamba", released)
    torch.save({"model": state, "model_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "w.pth")
    x = torch.randn(1, 3, 32, 32)
    overlay = dict(file=str(tmp_path / "w.pth"), num_classes=3)  # timm would replace the head of 1000
    through_timm = timm.create_model("vmamba_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **small).eval()
    here = ssmzoo.load_official("vmamba", tmp_path / "w.pth").eval()
    by_name = ssmzoo.create_model("vmamba_tiny", checkpoint=str(tmp_path / "w.pth"), **small).eval()
    expected = released.eval()(x)
    for model in (through_timm, here, by_name):
        assert relative_error(model(x), expected) < 1e-5


@pytest.mark.parametrize(
    "family, case, key",
    [
        ("vim", "classifier_rope_meanpool", "rope.freqs_cos"),
        ("moe_mamba", "transformer", "encoder.blocks.block_0.block.residual_attention.layer.attention.rope.sin"),
        ("mambair_v2", "light_x3", "relative_position_index_SA"),
    ],
)
def test_other_constants_than_ours_are_refused(family, case, key):
    case = GoldenCase.load(GOLDEN / family / f"{case}.json")
    state = {k: v.detach() for k, v in case.params.items()}
    ssmzoo.load_official(family, state, **case.official_kwargs)
    with pytest.raises(CheckpointError, match=f"{key} of the"):
        ssmzoo.load_official(family, state | {key: state[key] + 1}, **case.official_kwargs)


def test_a_head_that_the_released_mambair_lacks_is_named():
    state = to_official("mambair", TINY["mambair"]()) | {"conv_up1.weight": torch.zeros(64, 64, 3, 3)}
    with pytest.raises(ValueError, match="a head that enlarges by neighbours .* which the released MambaIR lacks"):
        ssmzoo.load_official("mambair", state)
