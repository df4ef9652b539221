"""Released weights by name, from a hub on the loopback that serves small files in each official layout."""

import argparse
import hashlib
import io

import pytest
import torch
from hub_server import COMMIT, Server

import ssmzoo
from ssmzoo.cli.main import main
from ssmzoo.presets import build_preset, model_class, read_model_config
from ssmzoo.released import catalogue as weights
from ssmzoo.released.download import DownloadError, fetch, note_of, weights_folder
from ssmzoo.released.family import to_official

SMALL = {  # a small model of each class that has released files, by constructor arguments
    "Adventurer": ("adventurer", {}),
    "BasedLM": ("based", {"d_model": 16, "n_heads": 2, "d_ff": 8, "feature_dim": 2, "vocab_size": 40}),
    "JRTRNNLM": ("jrt_rnn", {"d_model": 16, "n_heads": 2, "d_ff": 8, "feature_dim": 2, "vocab_size": 40}),
    "FalconMambaLM": ("falcon_mamba", {"d_model": 16, "n_layer": 2, "vocab_size": 40}),
    "MambaLM": ("mamba", {"d_model": 16, "n_layer": 2, "vocab_size": 40}),
    "Mamba2LM": ("mamba2", {"d_model": 64, "n_layer": 2, "vocab_size": 40}),
    "Mamba3LM": ("mamba3", {"d_model": 64, "n_layer": 2, "vocab_size": 40}),
    "MambaIR": ("mambair_light_x2", {"embed_dim": 30, "depths": [1, 1], "d_state": 2}),
    "MambaIRUNet": ("mambair_unet", {"dim": 30, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}),
    "MambaIRv2": ("mambair_v2", {}),
    "MambaVision": ("mamba_vision", {}),
    "ResVMamba": ("res_vmamba", {}),
    "ShuffleMambaReg": ("shuffle_mamba_reg_tiny", {"embed_dim": 32, "depth": 2, "img_size": 32, "n_registers": 2})
    + ({"cls_reduce": 2},),
    "SpatialMamba": ("spatial_mamba", {}),
    "Vim": ("vim", {}),
    "VMamba": ("vmamba", {}),
}
ENTRIES = weights.catalogue()
LAYOUTS = {}  # one entry for each family and class of ours
for _entry in ENTRIES.values():
    _cls = model_class(read_model_config(_entry.preset)["model"]["_target_"]).__name__
    LAYOUTS.setdefault((_entry.family, _cls), _entry)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.utils._http.DEFAULT_BACKOFF_SLEEP", 0, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def pickled(state, wrapper="model", **beside):
    out = io.BytesIO()
    torch.save({wrapper: state, **beside} if wrapper else state, out)
    return out.getvalue()


def offered(server, monkeypatch, cls="VMamba", family="vmamba", source=None, content=None, **more):
    """(a small model, its entry), whose file the server has."""
    preset, *changes = SMALL[cls]
    arguments = {key: value for change in changes for key, value in change.items()}
    torch.manual_seed(1)
    model = build_preset(preset, **arguments).eval()
    state = {key: value.clone() for key, value in to_official(family, model).items()}
    source = source or weights.Hub("owner/repo", "weights.pth", COMMIT)
    if content is None:
        content = pickled(
            state, model_ema={k: torch.zeros_like(v) for k, v in state.items()}, args=argparse.Namespace()
        )
    at = f"owner/repo/{source.file}" if isinstance(source, weights.Hub) else source.url.split("/", 3)[3]
    server.files[at] = content
    entry = weights.Weights(preset, source, family=family, model=arguments, **more)
    monkeypatch.setattr(weights, "catalogue", lambda: {entry.name: entry})
    return model, entry


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("layout", LAYOUTS, ids=[f"{family}-{cls}" for family, cls in LAYOUTS])
def test_every_official_layout_is_fetched_by_name(layout, hub, monkeypatch, tmp_path):
    family, cls = layout
    wrapper = LAYOUTS[layout].wrappers[0] if cls not in ("MambaLM", "Mamba2LM", "Mamba3LM") else ""
    preset, *changes = SMALL[cls]
    model, entry = offered(hub, monkeypatch, cls, family)
    state = {key: value.clone() for key, value in to_official(family, model).items()}
    hub.files["owner/repo/weights.pth"] = pickled(state, wrapper, **({"args": argparse.Namespace()} if wrapper else {}))
    found = ssmzoo.create_model(entry.preset, pretrained=True)
    assert type(found) is type(model) and equal(found, model)
    before = len(hub.requests)
    assert equal(ssmzoo.create_model(entry.preset, pretrained=True), model)
    assert len(hub.requests) == before  # the second comes from this machine
    (tmp_path / "mine.pth").write_bytes(hub.files["owner/repo/weights.pth"])
    assert fetch(entry, tmp_path / "mine.pth").exists()  # as a file that a person brings


def test_the_familys_choice_of_weights_is_taken_by_every_route(hub, monkeypatch):
    import timm

    import ssmzoo.timm  # noqa: F401

    model, entry = offered(hub, monkeypatch)
    assert equal(ssmzoo.create_model("vmamba", pretrained=True), model)
    node = read_model_config("vmamba")["model"]
    arguments = {k: v for k, v in node.items() if k != "_target_" and not str(v).startswith("$")}
    small = weights.Weights("vmamba_tiny", entry.source, family="vmamba")
    monkeypatch.setattr(weights, "catalogue", lambda: {"vmamba_tiny": small})
    assert equal(timm.create_model("vmamba_tiny", pretrained=True, **arguments), model)


def test_a_file_of_another_model_is_told_in_a_line_by_every_route(hub, monkeypatch):
    import timm

    import ssmzoo.timm  # noqa: F401

    strange = pickled({"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(2, 2)})
    _, entry = offered(hub, monkeypatch, content=strange)
    with pytest.raises(ValueError, match=r"does not fit vmamba as asked for; missing keys .* looks like .*BERT"):
        ssmzoo.create_model("vmamba", pretrained=True)
    node = read_model_config("vmamba")["model"]
    arguments = {k: v for k, v in node.items() if k != "_target_" and not str(v).startswith("$")}
    small = weights.Weights("vmamba_tiny", entry.source, family="vmamba")
    monkeypatch.setattr(weights, "catalogue", lambda: {"vmamba_tiny": small})
    with pytest.raises(ValueError, match=r"does not fit vmamba_tiny; missing keys [^\n]* looks like [^\n]*BERT"):
        timm.create_model("vmamba_tiny", pretrained=True, **arguments)


def test_release_assets_survive_a_broken_line_and_continue_an_interrupted_call(hub, monkeypatch):
    model, entry = offered(hub, monkeypatch, source=weights.Asset(f"{hub.url}/assets/a%23.pth"))
    hub.cut["assets/a%23.pth"] = 5000
    weights_folder().mkdir(parents=True)
    (weights_folder() / "vmamba.download").write_bytes(hub.files["assets/a%23.pth"][:1000])
    assert equal(ssmzoo.create_model("vmamba", pretrained=True), model)
    assert ("GET", "assets/a%23.pth", "bytes=1000-") in hub.requests and len(hub.requests) == 2
    assert sorted(f.name for f in weights_folder().iterdir()) == ["vmamba.json", "vmamba.safetensors"]


def test_a_cut_off_file_of_the_hub_is_continued(hub, monkeypatch):
    model, entry = offered(hub, monkeypatch)
    hub.cut["owner/repo/weights.pth"] = 5000
    assert equal(ssmzoo.create_model("vmamba", pretrained=True), model)


@pytest.mark.parametrize("kind", ["hub", "asset"])
def test_half_a_file_is_refused_and_not_kept(kind, hub, monkeypatch):
    source = weights.Asset(f"{hub.url}/assets/a.pth") if kind == "asset" else None
    model, entry = offered(hub, monkeypatch, source=source)
    at = next(iter(hub.files))
    whole, hub.files[at] = hub.files[at], hub.files[at][:-1000]
    with pytest.raises(ssmzoo.released.files.CheckpointError, match="cut off or damaged"):
        fetch(entry)
    hub.files[at] = whole
    if kind == "asset":
        assert equal(ssmzoo.create_model("vmamba", pretrained=True), model)


@pytest.mark.parametrize("kind", ["hub", "asset"])
def test_bytes_other_than_the_published_ones_are_refused(kind, hub, monkeypatch):
    source = weights.Asset(f"{hub.url}/assets/a.pth") if kind == "asset" else None
    model, entry = offered(hub, monkeypatch, source=source, sha256="ab" * 32)
    with pytest.raises(DownloadError, match="abababababababab... was published: it is damaged or was replaced"):
        fetch(entry)
    assert not note_of(entry).exists() and not (weights_folder() / "vmamba.safetensors").exists()


def test_the_first_download_is_recorded_and_a_later_difference_is_an_error(hub, monkeypatch):
    model, entry = offered(hub, monkeypatch, source=weights.Asset(f"{hub.url}/assets/a.pth"))
    kept = fetch(entry)
    kept.write_bytes(b"spoilt")
    assert fetch(entry) == kept and kept.stat().st_size > 1000  # damage here is mended by a new download
    kept.unlink()
    hub.files["assets/a.pth"] = pickled({k: v + 1 for k, v in model.state_dict().items()})
    with pytest.raises(DownloadError, match="was recorded at the first download"):
        fetch(entry)


def test_a_published_hash_is_checked_and_a_safetensors_file_stays_in_the_hubs_cache(hub, monkeypatch, tmp_path):
    from safetensors.torch import save

    model, _ = offered(hub, monkeypatch, "MambaLM", "mamba_hf")
    content = save({key: value.clone() for key, value in to_official("mamba_hf", model).items()})
    digest = hashlib.sha256(content).hexdigest()
    source = weights.Hub("owner/repo", "model.safetensors", COMMIT)
    _, entry = offered(hub, monkeypatch, "MambaLM", "mamba_hf", source, content, sha256=digest)
    assert equal(ssmzoo.create_model("mamba", pretrained=True), model)
    assert (tmp_path / "hf") in fetch(entry).parents


FAULTS = {
    "missing file": (
        lambda s: s.files.update({"owner/repo/else": s.files.pop("owner/repo/weights.pth")}),
        "no such file",
    ),
    "missing repository": (lambda s: s.files.clear(), "there is no repository"),
    "gated": (lambda s: s.gated.add("owner/repo"), "accept a licence first"),
    "unreachable": (lambda s: (s.shutdown(), s.server_close()), "cannot be reached"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_hub_does_not_give_is_told_in_one_message(fault, hub, monkeypatch, capsys):
    offered(hub, monkeypatch)
    break_it, message = FAULTS[fault]
    break_it(hub)
    with pytest.raises(SystemExit) as end:
        main(["weights", "fetch", "vmamba"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith("error: vmamba") and message in error


def test_a_release_that_cannot_be_reached_is_told_in_one_message(hub, monkeypatch):
    _, entry = offered(hub, monkeypatch, source=weights.Asset(f"{hub.url}/assets/a.pth"))
    hub.files.clear()
    with pytest.raises(DownloadError, match="a.pth has no such file any more"):
        fetch(entry)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(DownloadError, match="could not be fetched from http.*the same call continues"):
        fetch(entry)


def test_a_pinned_commit_that_is_gone_is_named(hub, monkeypatch):
    _, entry = offered(hub, monkeypatch, source=weights.Hub("owner/repo", "weights.pth", "f" * 40))
    with pytest.raises(DownloadError, match="no longer has the pinned commit"):
        fetch(entry)


def test_a_renamed_repository_is_followed(hub, monkeypatch):
    model, entry = offered(hub, monkeypatch)
    hub.files["new/home/weights.pth"] = hub.files.pop("owner/repo/weights.pth")
    hub.renamed["owner/repo"] = "new/home"
    assert equal(ssmzoo.create_model("vmamba", pretrained=True), model)


def test_offline_uses_what_is_here_and_says_what_is_not(hub, monkeypatch):
    model, entry = offered(hub, monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="not on this machine and HF_HUB_OFFLINE is set"):
        fetch(entry)
    assert not hub.requests
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fetch(entry)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert equal(ssmzoo.create_model("vmamba", pretrained=True), model)


def test_files_for_a_browser_are_taken_in_by_hand(hub, monkeypatch, tmp_path):
    model, _ = offered(hub, monkeypatch)
    _, entry = offered(hub, monkeypatch, source=weights.Hub("owner/repo", "weights.pth"))
    by_hand = weights.Weights("vmamba", weights.on_drive("key"), family="vmamba", model=entry.model)
    monkeypatch.setattr(weights, "catalogue", lambda: {"vmamba": by_hand})
    with pytest.raises(DownloadError, match="cannot be fetched by a program.*drive.google.com/file/d/key"):
        ssmzoo.create_model("vmamba", pretrained=True)
    lm = ("backbone.embedding.weight", "backbone.layers.0.mixer.x_proj.weight")
    for looks, keys in {"a ResNet": ("layer1.0.conv1.weight",), "family 'mamba'": lm}.items():
        (tmp_path / "other.pth").write_bytes(pickled({key: torch.zeros(2, 2) for key in keys}))
        with pytest.raises(ssmzoo.released.files.CheckpointError, match=f"does not fit vmamba .*other.pth.*{looks}"):
            fetch(by_hand, tmp_path / "other.pth")
    assert not note_of(by_hand).exists()
    (tmp_path / "mine.pth").write_bytes(hub.files["owner/repo/weights.pth"])
    fetch(by_hand, tmp_path / "mine.pth")
    assert equal(ssmzoo.create_model("vmamba", pretrained=True), model) and (tmp_path / "mine.pth").exists()


def test_pickles_that_run_something_are_refused(hub, monkeypatch):
    class Evil:
        def __reduce__(self):
            import os

            return os.system, ("true",)

    _, entry = offered(hub, monkeypatch, content=pickled({"a": torch.zeros(2)}, args=Evil()))
    with pytest.raises(ssmzoo.released.files.CheckpointError, match="system"):
        fetch(entry)


def test_another_number_of_classes_gets_a_new_head_and_says_so(hub, monkeypatch):
    model, _ = offered(hub, monkeypatch)
    with pytest.warns(UserWarning, match=r"the file has 1000 classes, the model 7: its head .* starts from random"):
        found = ssmzoo.create_model("vmamba", pretrained=True, num_classes=7)
    assert found.num_classes == 7
    own = found.state_dict()
    assert all(torch.equal(own[k], v) for k, v in model.state_dict().items() if not k.startswith("head."))
    with pytest.raises(ValueError, match="wrong shapes"):
        ssmzoo.create_model("vmamba", pretrained=True, in_chans=5)


def test_names_that_promise_weights_never_give_random_ones(hub, monkeypatch):
    with pytest.raises(ValueError, match="names released weights; add pretrained=True"):
        ssmzoo.create_model("mambair_denoise.sigma25")
    with pytest.raises(ValueError, match="unknown model 'vmamba_tny'; nearest: vmamba_tiny"):
        ssmzoo.create_model("vmamba_tny", pretrained=True)
    with pytest.raises(ValueError, match="no released weights are known for 'mamba_100m'"):
        ssmzoo.create_model("mamba_100m", pretrained=True)
    with pytest.raises(ValueError, match="choose one: mambair_jpeg.q10"):
        ssmzoo.create_model("mambair_jpeg", pretrained=True)


def test_a_checkpoint_of_other_classes_says_how_many_it_has(tmp_path):
    torch.save(build_preset("vmamba", num_classes=7).state_dict(), tmp_path / "seven.pt")
    with pytest.raises(ValueError, match="the head of the file has 7 classes: build the model with num_classes=7"):
        ssmzoo.create_model("vmamba", checkpoint=str(tmp_path / "seven.pt"))
    assert ssmzoo.create_model("vmamba", checkpoint=str(tmp_path / "seven.pt"), num_classes=7).num_classes == 7
