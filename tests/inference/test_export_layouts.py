"""What is exported comes back bit for bit, and computes in the other program what it computes here."""

import json

import exports
import pytest
import torch

import ssmzoo
from ssmzoo.checkpoint_files import MANIFEST
from ssmzoo.inference.export import export, formats
from ssmzoo.inference.export.source import family_of_class, read_source
from ssmzoo.inference.export.to_official import wrapper_of
from ssmzoo.released.family import find, to_ours
from ssmzoo.released.files import read_state_dict
from ssmzoo.released.fit import fit_state_dict

FORMATS = formats()


def exported(name, to, tmp_path):
    """(source, folder) of a tiny run; (source, None) where the format is refused in words and nothing is written."""
    source = exports.source(name, tmp_path / "run")
    reason = FORMATS[to].refuse(source)
    if reason is None:
        return source, export(source, to, tmp_path / "out")
    with pytest.raises(ValueError, match="it has .*safetensors") as refusal:
        export(source, to, tmp_path / "out")
    assert f"has no layout {to!r}: {reason}" in str(refusal.value) and not (tmp_path / "out").exists()
    return source, None


def assert_same(a: dict, b: dict):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]) and value.dtype == b[key].dtype, key


def test_every_format_says_what_it_is():
    assert {"safetensors", "official", "mamba_ssm", "hf", "timm", "gguf"} <= FORMATS.keys()
    for name, module in FORMATS.items():
        assert module.__doc__ and callable(module.refuse) and callable(module.write) and callable(module.usage), name


@pytest.mark.parametrize("name", exports.RUNS)
def test_safetensors_hold_every_tensor(name, tmp_path):
    source, out = exported(name, "safetensors", tmp_path)
    assert_same(read_state_dict(out / "model.safetensors"), dict(source.model.state_dict()))


@pytest.mark.parametrize("name", exports.RUNS)
def test_official_names_come_back_bit_for_bit(name, tmp_path):
    source, out = exported(name, "official", tmp_path)
    if out is None:
        return
    (file,) = [f for f in out.iterdir() if f.name != "README.md"]
    wrapper = wrapper_of(source)
    if wrapper is not None:
        assert list(torch.load(file, weights_only=True)) == [wrapper]
    ours = to_ours(source.model, read_state_dict(file))
    changed = [key for key, value in source.model.state_dict().items() if not torch.equal(ours[key], value)]
    assert all(key.endswith("A_log") for key in changed), changed  # where the official file holds A itself
    fresh = exports.build_model(source.node)
    fit_state_dict(fresh, ours)
    x = exports.inputs(name)
    torch.manual_seed(1)
    expected = exports.outputs(source.model, x)
    torch.manual_seed(1)
    tolerance = dict(rtol=1e-4, atol=1e-5) if changed else dict(rtol=0, atol=0)
    torch.testing.assert_close(exports.outputs(fresh.eval(), x), expected, **tolerance)


@pytest.mark.parametrize("name", exports.RUNS)
def test_mamba_ssm_folders_load_without_an_argument(name, tmp_path):
    source, out = exported(name, "mamba_ssm", tmp_path)
    if out is None:
        return
    config = json.loads((out / "config.json").read_text())
    fields = find("mamba", "TABLES")[0].names
    assert set(config) <= set(fields) and {"d_model", "n_layer", "vocab_size", "ssm_cfg"} <= set(config)
    assert "lm_head.weight" in torch.load(out / "pytorch_model.bin", weights_only=True)
    module = ssmzoo.load_official(out)
    x = exports.inputs(name)
    assert torch.equal(exports.outputs(module, x), exports.outputs(source.model, x))
    again = read_source(out)
    assert family_of_class(again.cls) == family_of_class(source.cls)
    export(again, "mamba_ssm", tmp_path / "again")
    first, second = (read_state_dict(folder / "pytorch_model.bin") for folder in (out, tmp_path / "again"))
    assert_same(first, second)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


@pytest.mark.parametrize("to, file", [("safetensors", "model.safetensors"), ("mamba_ssm", "pytorch_model.bin")])
def test_a_16_bit_file_stays_one(to, file, tmp_path):
    source = exports.source("mamba (text)", tmp_path / "run")
    torch.save({k: v.bfloat16() for k, v in source.model.state_dict().items()}, tmp_path / "w.bin")
    out = export(tmp_path / "w.bin", to, tmp_path / "out")
    assert {v.dtype for v in read_state_dict(out / file).values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", exports.RUNS)
def test_timm_reads_the_folder(name, tmp_path):
    timm = pytest.importorskip("timm")
    source, out = exported(name, "timm", tmp_path)
    if out is None:
        return
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    x = exports.inputs(name)
    torch.manual_seed(1)
    expected = exports.outputs(source.model, x)
    torch.manual_seed(1)
    assert torch.equal(exports.outputs(model, x), expected)
    assert model.pretrained_cfg["num_classes"] == 5 and model.pretrained_cfg["input_size"][1] == 32
    assert timm.create_model(f"local-dir:{out}", num_classes=3).get_classifier().out_features == 3


@pytest.mark.parametrize("name", exports.RUNS)
def test_gguf_holds_the_tensors_under_llama_cpp_s_names(name, tmp_path):
    gguf = pytest.importorskip("gguf")
    source, out = exported(name, "gguf", tmp_path)
    if out is None:
        return
    reader = gguf.GGUFReader(out / "model.gguf")
    arch = reader.fields["general.architecture"].contents()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 64)
    state = source.model.state_dict()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    for key, value in state.items():
        if key == "lm_head.weight" and torch.equal(value, state["backbone.embedding.weight"]):
            continue
        key = key.replace("mixer.dt_bias", "mixer.dt_proj.bias")  # as llama.cpp's converter does
        stem = key.removesuffix(".weight").removesuffix(".bias")
        mapped = names.get_name(stem) or names.get_name(key)
        assert mapped, key
        known = next(n for n in (mapped, f"{mapped}.{key.rpartition('.')[2]}", f"{mapped}.bias") if n in tensors)
        stored = tensors.pop(known)
        stored = torch.log(-stored) if key.endswith("A_log") else stored
        torch.testing.assert_close(stored.reshape(value.shape), value, rtol=1e-5, atol=1e-6)
    assert not tensors
    for field in ("ssm.inner_size", "ssm.state_size", "ssm.conv_kernel", "ssm.time_step_rank", "block_count"):
        assert reader.fields[f"{arch}.{field}"].contents() > 0


def test_gguf_vocabulary_has_as_many_tokens_as_the_embedding(tmp_path):
    gguf = pytest.importorskip("gguf")
    node = {"_target_": "ssmzoo.models.mamba.MambaLM", "vocab_size": 290, "d_model": 16, "n_layer": 1}
    run = exports.write(node, tmp_path / "run", tokenizer=exports.bpe().to_dict())
    reader = gguf.GGUFReader(export(run, "gguf", tmp_path / "out") / "model.gguf")
    embedding = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == len(embedding.data) == 296


def test_card_says_where_the_model_comes_from(tmp_path):
    source, out = exported("mamba (text)", "mamba_ssm", tmp_path)
    card = (out / "README.md").read_text()
    assert card.startswith("---\npipeline_tag: text-generation")
    assert "val/loss 1.5" in card and "abc123" in card and str(tmp_path / "run") in card and "MambaLMHeadModel" in card


def test_command_line(call, tmp_path):
    run = exports.run("mamba (text)", tmp_path / "run")
    status, printed, _ = call("ckpt", "export", str(run), "--to", "list", entry="ssmzoo")
    assert status == 0 and "timm          no: timm holds image models" in printed
    status, printed, _ = call("ckpt", "export", str(run), "--to", "hf", "--out", "out", entry="ssmzoo")
    assert status == 0 and (tmp_path / "out" / "config.json").exists() and "out/model.safetensors" in printed
    assert f"`ssmzoo ckpt export {run} --to hf --out out`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--to", "mamba_sm", "--out", "x"), "unknown export format 'mamba_sm'; nearest: mamba_ssm"),
        (("--to", "timm", "--out", "x"), "mamba (text) has no layout 'timm': timm holds image models; it has "),
        (("--to", "hf"), "--out is missing"),
        (("--to", "hf", "--out", "run"), "run exists; choose another --out"),
    ],
)
def test_bad_input_gives_one_message(call, tmp_path, arguments, message):
    run = exports.run("mamba (text)", tmp_path / "run")
    status, _, error = call("ckpt", "export", str(run), *arguments, entry="ssmzoo")
    assert status == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_damaged_and_missing_checkpoints(call, tmp_path):
    run = exports.run("mamba (text)", tmp_path / "run")
    (run / MANIFEST).write_text((run / MANIFEST).read_text()[:100])
    for path in (run, tmp_path / "nowhere"):
        status, _, error = call("ckpt", "export", str(path), "--to", "hf", "--out", "x", entry="ssmzoo")
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("kind, error", [("f32", 1e-5), ("f16", 1e-3), ("q8_0", 0.03), ("q4_0", 0.3)])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gguf_files_come_back(name, kind, error, tmp_path):
    """As weights in mamba_ssm's names, whatever the type of the large matrices; the smaller type, the smaller file."""
    pytest.importorskip("gguf")
    mixer = {"ssm_cfg": {"d_state": 8, "headdim": 16, "ngroups": 2}} if name == "mamba2" else {}
    target = f"ssmzoo.models.{name}.Mamba{'2' if mixer else ''}LM"
    node = {"_target_": target, "vocab_size": 64, "d_model": 64, "n_layer": 2, **mixer}
    run = exports.write(node, tmp_path / "run")
    file = export(run, "gguf", tmp_path / "out", type=kind) / "model.gguf"
    model = read_source(run).model
    read = ssmzoo.load_official(file)
    ids = torch.arange(20)[None]
    expected, found = model(ids).logits, read(ids)[0]
    assert (found - expected).norm() <= error * expected.norm()
    large = model.lm_head.weight.numel() + sum(
        m.weight.numel() for n, m in model.named_modules() if n.endswith(("in_proj", "out_proj"))
    )
    bits = {"f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5}[kind]
    others = sum(p.numel() for p in model.parameters()) - large
    assert abs(file.stat().st_size - large * bits / 8 - 4 * others) < 20_000


def test_gguf_that_cannot_be_read_is_refused_in_words(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match="damaged.gguf"):
        read_state_dict(tmp_path / "damaged.gguf")
    run = exports.write(
        {"_target_": "ssmzoo.models.mamba.MambaLM", "vocab_size": 64, "d_model": 32, "n_layer": 1}, tmp_path / "run"
    )
    with pytest.raises(ValueError, match="unknown type 'q5_1'.*q4_0"):
        export(run, "gguf", tmp_path / "out", type="q5_1")
    with pytest.raises(ValueError, match="has no type"):
        export(run, "hf", tmp_path / "out", type="q8_0")
