"""Our image models behave in timm's registry like timm's own: what its tests/test_models.py checks, at small sizes."""

import pytest
import torch

import ssmzoo.timm  # registers, and lets timm find torchvision
from ssmzoo.layers.image.drop_path import DropPath
from ssmzoo.released.download import DownloadError
from ssmzoo.released.vim import released_angles

import timm  # isort: skip

STAGED = {
    "vmamba_tiny": dict(depths=(1, 1, 1, 1), dims=8),
    "res_vmamba_small": dict(depths=(1, 1, 1, 1), dims=8, d_state=2),
    "vmamba_vanilla_tiny": dict(depths=(1, 1, 1, 1), dims=8, d_state=2),
    "spatial_mamba_tiny": dict(depths=(1, 1, 1, 1), embed_dim=8),
}
PLAIN = {
    "vim_tiny": dict(depth=4, embed_dim=16, d_state=2),
    "shuffle_mamba_tiny": dict(depth=4, embed_dim=16, d_state=2),
    "shuffle_mamba_reg_base": dict(depth=4, embed_dim=16, d_state=2),
    "adventurer_tiny": dict(depth=4, embed_dim=32, d_state=4),
}
ALL = STAGED | PLAIN


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **(ALL[name] | kwargs))


def test_published_sizes_are_registered():
    names = ssmzoo.timm.__all__
    assert {"vmamba_tiny", "spatial_mamba_base", "vim_small", "shuffle_mamba_reg_base"} <= set(names)
    assert "vmamba" not in names  # the laptop size belongs to the zoo
    assert set(timm.list_models("spatial_mamba*")) == {f"spatial_mamba_{s}" for s in ("tiny", "small", "base")}


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="no argument 'depth'; nearest: depths"):
        timm.create_model("vmamba_tiny", depth=2)


@pytest.mark.parametrize("name", ALL)
def test_backward_reaches_every_parameter(name):
    model = create(name, num_classes=42, drop_path_rate=0.1).train()
    out = model(torch.randn(2, 3, 64, 64))
    out.mean().backward()
    assert out.shape == (2, 42) and not out.isnan().any()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_default_cfg_and_head(name):
    model = create(name).eval()
    cfg, keys, x = model.default_cfg, model.state_dict().keys(), torch.randn(1, 3, 224, 224)
    assert cfg["first_conv"] + ".weight" in keys and cfg["classifier"] + ".weight" in keys
    assert model.get_classifier().out_features == 1000
    features = model.forward_features(x)
    if name in STAGED:
        assert features.shape[1:] == (model.num_features, *cfg["pool_size"])
    else:
        assert features.shape[-1] == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    torch.testing.assert_close(model.forward_head(features), model(x))
    model.reset_classifier(0)
    assert model(x).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    assert create(name, num_classes=0, global_pool="").eval()(x).shape == features.shape
    model.reset_classifier(7, "avg")
    assert model.num_classes == 7
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(7, "")


@pytest.mark.parametrize("name", STAGED)
def test_pyramid(name):
    model = create(name, features_only=True, in_chans=2).eval()
    assert model.feature_info.channels() == [8, 16, 32, 64] and model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(torch.randn(1, 2, 96, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 24, 16), (16, 12, 8), (32, 6, 4), (64, 3, 2)]
    some = create(name, features_only=True, out_indices=(0, 2)).eval()
    assert [m.shape[1] for m in some(torch.randn(1, 3, 64, 64))] == [8, 32]
    assert len(some.model.layers) == 3 and some.model.layers[2].downsample is None


@pytest.mark.parametrize("name", ALL)
def test_intermediates(name):
    model, x = create(name).eval(), torch.randn(1, 3, 64, 64)
    final, every = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(every) == 4 and every[-1].shape[1] == model.feature_info[-1]["num_chs"]
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[0]
    if name in STAGED:
        torch.testing.assert_close(last, final)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)[0]
    torch.testing.assert_close(early, every[0])
    with pytest.raises(ValueError, match="features 0 to 3"):
        model.forward_intermediates(x, indices=[4])


@pytest.mark.parametrize("name", PLAIN)
def test_taps_of_plain_encoders(name):
    model = create(name, features_only=True).eval()
    assert all(m.shape[2:] == (4, 6) for m in model(torch.randn(1, 3, 64, 96)))
    model, x = create(name).eval(), torch.randn(1, 3, 64, 64)
    streams = model.forward_intermediates(x, intermediates_only=True)
    branches = model.forward_intermediates(x, intermediates_only=True, tap="branch")
    torch.testing.assert_close(streams[1] - streams[0], branches[1], rtol=1e-4, atol=1e-5)
    patches, tokens = model.forward_intermediates(x, [1], return_prefix_tokens=True, intermediates_only=True)[0]
    assert tokens.shape == (1, model.num_prefix_tokens, model.embed_dim)


@pytest.mark.parametrize("name", ALL)
def test_layer_decay_and_weight_decay_groups(name):
    from timm.models import group_parameters
    from timm.optim import create_optimizer_v2

    model = create(name)
    depth = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(depth) == {n for n, _ in model.named_parameters()}
    assert depth["patch_embed.conv1.conv.weight" if "spatial" in name else "patch_embed.proj.weight"] == 0
    assert depth["head.weight"] == max(depth.values()) >= 5
    kept = {
        id(p)
        for g in create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.9).param_groups
        if g["weight_decay"] == 0
        for p in g["params"]
    }
    names = ("A_log", "A_logs", "D", "Ds", "pos_embed")
    spared = [id(p) for n, p in model.named_parameters() if n.rpartition(".")[2] in names]
    assert spared and kept.issuperset(spared)


@pytest.mark.parametrize(
    "name", ["vim_tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n != "vim_tiny")]
)
def test_export(name):
    model, x = create(name).eval(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["spatial_mamba_tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n != "spatial_mamba_tiny")]
)
def test_compile_as_one_graph(name):
    """Inference and a training step, as `compile=true` of the trainer runs them."""
    torch._dynamo.reset()  # the models share a forward, of which a process keeps eight compiled forms
    depths = {"depths": [1, 1, 1, 1]} if name == "spatial_mamba_tiny" else {}  # its blocks are traced one by one
    model, x = create(name, drop_path_rate=0.0, **depths).eval(), torch.randn(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_released_file_through_timm(tmp_path):
    source = create("vim_tiny", num_classes=5)
    angles = released_angles(source.grid, source.embed_dim, source.rope_options.reference)  # a table that files hold
    torch.save({"model": source.state_dict() | {"rope.freqs_cos": angles.cos()}}, tmp_path / "vim.pth")
    overlay = dict(file=str(tmp_path / "vim.pth"), num_classes=5)
    loaded = create("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(x), source.eval()(x))
    smaller = create("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, img_size=96).eval()
    assert smaller(x).shape == (1, 3) and smaller.grid == (6, 6)


@pytest.mark.parametrize("name", ["vmamba_tiny", "spatial_mamba_tiny"])
def test_output_stride(name):
    x = torch.randn(1, 3, 64, 96)
    for stride, sides in ((32, (2, 3)), (16, (4, 6)), (8, (8, 12))):
        model = create(name, output_stride=stride, features_only=True).eval()
        assert model.feature_info.reduction() == [min(r, stride) for r in (4, 8, 16, 32)]
        assert tuple(model(x)[-1].shape[2:]) == sides
        assert create(name, output_stride=stride).eval().forward_features(x).shape[2:] == sides
    dense = create(name, output_stride=8)
    dense.load_state_dict(create(name).state_dict())
    with pytest.raises(ValueError, match="output_stride=12; this model has 4, 8, 16, 32"):
        create(name, output_stride=12)
    with pytest.raises(ValueError, match="3x3 convolution, not PatchMerging"):
        create("vmamba_vanilla_tiny", output_stride=16)


@pytest.mark.parametrize("name", ALL)
def test_pools_image_sizes_channels_and_depth_rates(name):
    model = create(name, global_pool="max" if name in STAGED else "avg", drop_path_rate=0.2, drop_rate=0.1, in_chans=1)
    rates = [m.p for m in model.modules() if isinstance(m, DropPath)]
    assert max(rates) > 0 and rates == sorted(rates)
    assert model.head_drop.p == 0.1 or name in PLAIN
    assert model.eval()(torch.randn(2, 1, 64, 64)).shape == (2, 1000)
    if name in PLAIN:
        assert create(name, img_size=96).grid == (6, 6)
    model.set_grad_checkpointing()
    assert model.grad_checkpointing and model.num_features == model.feature_info[-1]["num_chs"]
    assert list(model.no_weight_decay())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("named", [True, False])
def test_hub_round_trip(name, named, tmp_path):
    """What `push_to_hf_hub` writes is read back by `timm.create_model`, with and without arguments named."""
    from timm.models import save_for_hf

    arguments = ALL[name] | (dict(img_size=(64, 96)) if name in PLAIN else {})
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    save_for_hf(model, tmp_path, model_args=arguments if named else None)
    loaded, x = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval(), torch.randn(2, 3, 64, 96)
    assert loaded.num_classes == 7 and torch.equal(loaded(x), model(x))


def what_timm_does_with_models():
    """Every public function of timm.models whose first argument is a model."""
    import inspect

    for helper in sorted(dir(timm.models)):
        function = getattr(timm.models, helper)
        if inspect.isfunction(function) and not helper.startswith("_"):
            if next(iter(inspect.signature(function).parameters), None) == "model":
                yield helper


HELPERS = {  # how each is called, and what holds for its answer
    "create_feature_extractor": None,
    "get_graph_node_names": None,
    "get_model_args": lambda f, m, p: f(m)["num_classes"] == 7,
    "get_model_input_config": lambda f, m, p: f(m)["first_conv"] == m.first_conv,
    "get_model_traits": lambda f, m, p: f(m)["num_classes"] == 7,
    "load_checkpoint": lambda f, m, p: not f(m, str(p)).missing_keys,
    "load_custom_pretrained": None,
    "load_pretrained": None,
    "model_parameters": lambda f, m, p: len(list(f(m, exclude_head=True))) == len(list(m.parameters())) - 2,
    "push_to_hf_hub": None,  # needs a network; its local part is `save_for_hf`
    "reparameterize_model": lambda f, m, p: f(m).state_dict().keys() == m.state_dict().keys(),
    "resume_checkpoint": lambda f, m, p: f(m, str(p)) is None,
    "save_for_hf": lambda f, m, p: f(m, p.parent / "hub") is None and (p.parent / "hub" / "config.json").is_file(),
}


@pytest.mark.parametrize("helper", what_timm_does_with_models())
@pytest.mark.parametrize("name", ALL)
def test_helpers_of_timm(name, helper, tmp_path, monkeypatch):
    model, file = create(name, num_classes=7).eval(), tmp_path / "weights.pth"
    torch.save({"state_dict": model.state_dict()}, file)
    function, right = getattr(timm.models, helper), HELPERS[helper]
    if right is not None:
        assert right(function, model, file)
    elif helper in ("create_feature_extractor", "get_graph_node_names"):
        arguments = (["patch_embed"],) if helper == "create_feature_extractor" else ()
        with pytest.raises(TypeError, match="torch.fx's symbolic tracing"):
            function(model, *arguments)
    elif helper in ("load_pretrained", "load_custom_pretrained"):

        def unreachable(entry, **_):
            raise DownloadError(f"{entry.name} cannot be reached")

        monkeypatch.setattr("ssmzoo.released.download.fetch", unreachable)
        with pytest.raises((DownloadError, ValueError), match="cannot be reached|no released weights are known"):
            timm.create_model(name, pretrained=True, **ALL[name])
