"""Exports of the Mambas in transformers' own classes: same logits, same greedy text, known keys."""

import json

import exports
import pytest
import torch

from ssmzoo._torchvision import make_importable

make_importable()
transformers = pytest.importorskip("transformers")
import ssmzoo  # noqa: E402
from ssmzoo.inference.export import export, to_hf  # noqa: E402
from ssmzoo.inference.export.source import read_source  # noqa: E402
from ssmzoo.inference.generate import generate  # noqa: E402
from ssmzoo.released.files import read_state_dict  # noqa: E402

LM = "ssmzoo.models.{}"
SMALL = dict(vocab_size=29, d_model=16, n_layer=2, pad_vocab_size_multiple=1)
TWO = dict(d_state=8, headdim=8, chunk_size=4)
NODES = {
    "mamba": dict(_target_=LM.format("mamba.MambaLM"), ssm_cfg=dict(d_state=4)),
    "mamba: biases, own head, wide, padded": dict(
        _target_=LM.format("mamba.MambaLM"),
        ssm_cfg=dict(d_conv=3, bias=True, expand=3, dt_rank=5),
        tie_embeddings=False,
        norm_eps=1e-3,
        pad_vocab_size_multiple=8,
    ),
    "mamba: no bias of the convolution": dict(_target_=LM.format("mamba.MambaLM"), ssm_cfg=dict(conv_bias=False)),
    "falcon_mamba": dict(_target_=LM.format("falcon_mamba.FalconMambaLM"), ssm_cfg=dict(mixer_rms_eps=1e-2)),
    "mamba2": dict(_target_=LM.format("mamba2.Mamba2LM"), ssm_cfg=TWO),
    "mamba2: own head, limits": dict(
        _target_=LM.format("mamba2.Mamba2LM"), ssm_cfg=TWO | dict(dt_limit=[0.01, 0.05]), tie_embeddings=False
    ),
}
VLLM = {  # what vLLM's classes read of config.json
    "mamba": "hidden_size state_size conv_kernel intermediate_size time_step_rank use_conv_bias use_bias hidden_act "
    "layer_norm_epsilon num_hidden_layers vocab_size pad_token_id tie_word_embeddings model_type",
    "mamba2": "hidden_size state_size conv_kernel intermediate_size expand use_conv_bias use_bias n_groups num_heads "
    "head_dim layer_norm_epsilon hidden_act tie_word_embeddings num_hidden_layers vocab_size rms_norm model_type",
}
VLLM["falcon_mamba"] = VLLM["mamba"] + " mixer_rms_eps"
every = pytest.mark.parametrize("name", NODES)


@pytest.fixture
def pair(name, tmp_path):
    """(our model, transformers' model, folder)"""
    run = exports.write(NODES[name] | SMALL | {k: v for k, v in NODES[name].items() if k in SMALL}, tmp_path / "run")
    out = export(run, "hf", tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__module__.startswith("transformers.models.")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return read_source(run).model, theirs.eval(), out


@every
def test_logits_and_greedy_text_are_ours(name, pair):
    ours, theirs, _ = pair
    ids = torch.randint(29, (2, 11))
    expected = exports.outputs(ours, ids)
    assert (exports.outputs(theirs, ids) - expected).norm() < 1e-5 * expected.norm()
    if "limits" in name:
        return  # transformers' single-token steps forget the limits of the time step
    text = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert text[:, 11:].tolist() == generate(ours, ids, 8, greedy=True)


@every
def test_keys_are_those_of_transformers_and_vllm(name, pair):
    _, theirs, out = pair
    config = json.loads((out / "config.json").read_text())
    saved = set(json.loads(theirs.config.to_json_string(use_diff=False)))
    assert set(config) - {"intermediate_size", "rms_norm"} <= saved
    assert set(VLLM[config["model_type"]].split()) <= set(config)
    theirs.save_pretrained(out.parent / "theirs")
    ours, saved = read_state_dict(out), read_state_dict(out.parent / "theirs")
    assert set(ours) - set(saved) <= {"lm_head.weight"}
    assert all(torch.equal(ours[key], value) for key, value in saved.items())


@every
def test_the_folder_comes_back_bit_for_bit(name, pair):
    ours, _, out = pair
    module = ssmzoo.load_official(out)
    for key, value in ours.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key
    ids = torch.randint(29, (2, 11))
    assert torch.equal(exports.outputs(module, ids), exports.outputs(ours, ids))
    again = export(out, "hf", out.parent / "again")
    first, second = read_state_dict(out), read_state_dict(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(rms_norm=False), "RMSNorm only"),
        (dict(d_intermediate=8), "no gated MLP"),
        (dict(attn_layer_idx=[1], attn_cfg=dict(num_heads=2)), "no attention layers"),
        (dict(ssm_cfg=dict(expand=1.5)), "expand is a whole number, this model's 1.5"),
    ],
)
def test_what_transformers_lacks_gets_the_zoo_s_class(changes, reason, tmp_path):
    source = read_source(exports.write(NODES["mamba"] | SMALL | changes, tmp_path / "run"))
    assert reason in to_hf.why_not_native(source)
    assert json.loads((export(source, "hf", tmp_path / "out") / "config.json").read_text())["model_type"] == "ssmzoo"
