"""Fine-tuning: frozen parameters stand still, LoRA merges, tokenizers stay with their weights."""

import sys
from pathlib import Path

import pytest
import torch

from ssmzoo.adapt.lora import ORIGINAL, add_lora, merge, merged
from ssmzoo.checkpoint_files import find_checkpoint, read_manifest, read_weights
from ssmzoo.cli.train import train
from ssmzoo.presets import build_preset
from ssmzoo.train.build import total_steps, warn_of_warmup
from ssmzoo.train.finetune import frozen_names, prepare
from ssmzoo.train.optim import parameter_groups, schedule
from ssmzoo.zoo import create_model, load_model

QUICK = ["trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=4"]


def run(folder: Path, *words) -> Path:
    sys.argv = ["train.py", *QUICK, f"runs_dir={folder}", "trainer.accelerator=cpu", *words]
    train()
    return max(folder.glob("*/*"), key=lambda f: f.stat().st_mtime)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "my.txt"
    file.write_text("\n\n".join(f"Sentence {i} says {i * i} and nothing more." for i in range(3000)))
    return file


TEXT = {"vocab_size": 32}
MODELS = {"mamba": TEXT, "mamba2": TEXT, "mamba_scenario": TEXT, "vim": {}, "vmamba": {}, "spatial_mamba": {}}


@pytest.mark.parametrize("name", MODELS)
def test_lora_starts_as_the_model_and_merges_into_plain_names(name):
    torch.manual_seed(0)
    model = build_preset(name, **MODELS[name]).eval()
    x = torch.randint(32, (2, 12)) if "vocab_size" in MODELS[name] else torch.randn(2, 3, 224, 224)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    output = (lambda m: m(x).logits) if "vocab_size" in MODELS[name] else (lambda m: m(x))
    with torch.no_grad():
        before = output(model)
        add_lora(model, rank=2)
        assert torch.allclose(output(model), before, atol=1e-6)
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == ("lora_" in key or key.split(".")[0] == "head"), key
            if "lora_B" in key:
                parameter.normal_(std=0.02)
        after = output(model)
        assert not torch.allclose(after, before)
        plain = merged(model.state_dict())
        assert plain.keys() == own.keys()
        other = build_preset(name, **MODELS[name]).eval()
        other.load_state_dict(plain)
        assert torch.allclose(output(other), after, atol=1e-5)
        assert torch.allclose(output(merge(model)), after, atol=1e-5) and model.state_dict().keys() == own.keys()


def test_freeze_by_number_glob_and_probe():
    model = build_preset("vmamba", num_classes=3)
    heads = {"head.weight", "head.bias"}
    every = {name for name, _ in model.named_parameters()}
    assert frozen_names(model, "all_but_head") == every - heads
    assert all(name.startswith("patch_embed") for name in frozen_names(model, 0)) and frozen_names(model, 0)
    first = frozen_names(model, 1)
    assert any(n.startswith("layers.0.") for n in first) and not any(n.startswith("layers.1.") for n in first)
    assert frozen_names(model, "layers.1") == {n for n in every if n.startswith("layers.1.")}
    assert frozen_names(model, ["*.in_proj.weight"]) == {n for n in every if n.endswith("in_proj.weight")}
    with pytest.raises(ValueError, match="no parameter or module is called 'layer.1'; nearest: layers.1"):
        frozen_names(model, "layer.1")
    with pytest.raises(ValueError, match="has 3 stages|has 4 stages|has 2 stages"):
        frozen_names(model, 99)
    with pytest.raises(ValueError, match="nothing is left to train"):
        prepare(model, freeze="*")
    with pytest.raises(ValueError, match="lora.rang is unknown; nearest: rank"):
        prepare(model, lora={"rang": 2})
    with pytest.raises(ValueError, match="no linear layer is called 'inproj'"):
        add_lora(model, targets="inproj")


def test_frozen_batch_norms_keep_their_statistics():
    model = build_preset("spatial_mamba", num_classes=3)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    prepare(model, freeze="all_but_head")
    before = [norm.running_mean.clone() for norm in norms]
    model.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before))


def test_a_warm_up_fits_runs_of_any_length(capsys):
    data = type("Data", (), {"train_dataloader": lambda self: range(3)})()
    limits = [({"max_steps": 7}, 7), ({"max_steps": 7, "max_epochs": 2}, 6), ({"max_steps": 5, "max_epochs": 2}, 5)]
    for limit, steps in [*limits, ({"max_steps": -1, "max_epochs": 2}, 6)]:
        assert total_steps(limit, data) == steps  # what ends first
    rate = schedule("cosine", 40, 0.1, 0.0)
    assert [rate(s) for s in range(4)] == [0.25, 0.5, 0.75, 1.0] and rate(5) < 1.0
    warn_of_warmup(40, 0.1), warn_of_warmup(40, 40)
    assert capsys.readouterr().out == ""
    warn_of_warmup(40, 100)
    assert "the run has 40: it never comes to its peak" in capsys.readouterr().out


def test_layer_decay_works_for_language_models_too():
    model = build_preset("mamba", vocab_size=16, n_layer=3)
    rates = {id(p): g["lr"] for g in parameter_groups(model, 0.1, 1.0, layer_decay=0.5) for p in g["params"]}
    found = [rates[id(model.backbone.layers[i].mixer.in_proj.weight)] for i in range(3)]
    assert rates[id(model.backbone.embedding.weight)] == 0.5**4 and found == [0.5**3, 0.5**2, 0.5]
    assert rates[id(model.backbone.norm_f.weight)] == 1.0


def test_a_fine_tuned_run_keeps_tokenizer_and_frozen_weights(tmp_path, text):
    small = ["model=mamba", "model.d_model=32", "model.n_layer=2", "data.seq_len=32", "data.val_tokens=500"]
    first = run(tmp_path / "a", *small, f"data.path={text}", "data.tokenizer=bpe", "data.bpe_vocab_size=300")
    other = tmp_path / "other.txt"
    other.write_text(text.read_text()[::-1])
    more = [*small, f"data.path={other}", f"init_from={first}"]
    second = run(tmp_path / "b", *more, "freeze=1")
    manifests = [read_manifest(find_checkpoint(run_dir)) for run_dir in (first, second)]
    assert manifests[0]["tokenizer"]["json"] == manifests[1]["tokenizer"]["json"]
    a, b = read_weights(first), read_weights(second)
    assert torch.equal(a["backbone.layers.0.mixer.in_proj.weight"], b["backbone.layers.0.mixer.in_proj.weight"])
    assert not torch.equal(a["backbone.layers.1.mixer.in_proj.weight"], b["backbone.layers.1.mixer.in_proj.weight"])


def test_a_lora_run_is_resumed_and_loads_as_a_plain_model(tmp_path, text):
    small = ["model=mamba", "model.d_model=32", "model.n_layer=2", "data.seq_len=32", "data.val_tokens=500"]
    done = run(tmp_path, *small, f"data.path={text}", "lora.rank=2", "optim.lr=0.01")
    model, manifest = load_model(done)
    assert manifest["config"]["lora"] == {"rank": 2} and not any("lora" in key for key in model.state_dict())
    sys.argv = ["train.py", f"resume={done}", "trainer.max_steps=4"]
    train()
    folder = find_checkpoint(done, "last")
    assert read_manifest(folder)["step"] == 4
    from ssmzoo.released.files import read_state_dict

    assert any(key.endswith(ORIGINAL) for key in read_state_dict(folder / "model.safetensors"))
    before, after = model.state_dict(), read_weights(done, "last")
    assert torch.equal(before["backbone.embedding.weight"], after["backbone.embedding.weight"])
    assert not torch.equal(
        before["backbone.layers.0.mixer.in_proj.weight"], after["backbone.layers.0.mixer.in_proj.weight"]
    )
    create_model("mamba", checkpoint=str(done), **{k: v for k, v in manifest["config"]["model"].items() if k[0] != "_"})


def test_released_weights_start_a_run_with_their_tokenizer(tmp_path, text, monkeypatch):
    import io

    from hub_server import Server

    from ssmzoo.data.text_tokenizer import train_bpe
    from ssmzoo.released import catalogue as weights

    tokenizer = train_bpe([text.read_text()], 300)
    torch.manual_seed(3)
    model = build_preset("mamba", vocab_size=tokenizer.vocab_size, d_model=32, n_layer=2)
    file, server = io.BytesIO(), Server()
    torch.save(model.state_dict(), file)
    server.files["owner/repo/pytorch_model.bin"] = file.getvalue()
    server.files["owner/words/tokenizer.json"] = tokenizer.to_dict()["json"].encode()
    for name, value in ("HF_ENDPOINT", server.url), ("HF_HOME", tmp_path / "hf"), ("TORCH_HOME", tmp_path / "torch"):
        monkeypatch.setenv(name, str(value))
    source = weights.Hub("owner/repo", "pytorch_model.bin")
    entry = weights.Weights("mamba", source, tokenizer="owner/words", family="mamba")
    monkeypatch.setattr(weights, "catalogue", lambda: {"mamba": entry})
    small = ["model=mamba", "model.d_model=32", "model.n_layer=2", "data.seq_len=32", "data.val_tokens=500"]
    done = run(tmp_path / "runs", *small, f"data.path={text}", "pretrained=true", "optim.lr=0", "optim.weight_decay=0")
    server.shutdown()
    assert read_manifest(find_checkpoint(done))["tokenizer"]["json"] == tokenizer.to_dict()["json"]
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in read_weights(done).items())


def test_a_head_for_classes_of_other_names_stays_new_even_where_its_shape_fits(call, tmp_path):
    from PIL import Image

    for folder, names in (("one", "ab"), ("two", "cd")):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (32, 32), (40 * i, 10, ord(name))).save(tmp_path / folder / name / f"{i}.png")
    small = [
        "model=vmamba",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "data.batch_size=4",
        "runs_dir=runs",
    ]
    assert call(*small, "data.path=one", "name=a")[0] == 0
    for folder, said in (("two", "the head is new"), ("one", "88 of 88 tensors\n")):
        status, out, err = call(*small, f"data.path={folder}", f"name={folder}", "init_from=runs/vmamba/a")
        assert status == 0 and said in out, out + err
