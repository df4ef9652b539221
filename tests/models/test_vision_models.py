"""The image models: published sizes, any image, first loss, shuffling, positions, released checkpoints and errors."""

import math

import pytest
import torch
from toy import assert_checkpointing_changes_nothing

import ssmzoo
from ssmzoo.layers.image.plain_backbone import insert_tokens, split_tokens, token_indices
from ssmzoo.layers.image.ss2d import SS2D
from ssmzoo.models.adventurer import FLIP_RULES, Adventurer, AdventurerBlock
from ssmzoo.models.res_vmamba import ResVMamba
from ssmzoo.models.shuffle_mamba import ShuffleMamba, ShuffleMambaReg, draw_permutations
from ssmzoo.models.spatial_mamba import SpatialMamba
from ssmzoo.models.vim import Vim
from ssmzoo.models.vmamba import VMamba
from ssmzoo.presets import build_model, read_model_config
from ssmzoo.released import vim as released_vim
from ssmzoo.released.family import looks_like
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.vmamba import parse_forward_type

PUBLISHED = {  # parameters at 224 pixels with 1000 classes
    "spatial_mamba_tiny": 26_748_862,
    "spatial_mamba_small": 43_074_280,
    "spatial_mamba_base": 95_745_592,
    "vmamba_tiny": 30_249_064,
    "vmamba_small": 50_147_752,
    "vmamba_base": 88_557_800,
    "vmamba_tiny_s2l5": 30_705_832,
    "vmamba_small_s1l20": 49_012_840,
    "vmamba_base_s1l20": 86_614_504,
    "vmamba_vanilla_tiny": 22_893_448,
    "vmamba_vanilla_small": 44_417_416,
    "vmamba_vanilla_base": 76_254_056,
    "res_vmamba_small": 44_417_416 + 388_416,
    "vim_tiny": 7_148_008,
    "vim_small": 25_796_584,
    "vim_base": 97_598_440,
    "vim_tiny_plus": 7_250_344,
    "shuffle_mamba_tiny": 7_148_008,
    "shuffle_mamba_small": 25_796_584,
    "shuffle_mamba_middle": 74_236_456,
    "shuffle_mamba_base": 97_598_440,
    "shuffle_mamba_large": 340_034_536,
    "shuffle_mamba_large_d40": 283_698_152,
    "shuffle_mamba_reg_tiny": 9_264_232,
    "shuffle_mamba_reg_small": 27_801_064,
    "shuffle_mamba_reg_base": 99_301_096,
    "shuffle_mamba_reg_large": 341_222_376,
    "adventurer_tiny": 11_608_840,
    "adventurer_small": 44_491_816,
    "adventurer_base": 98_657_608,
    "adventurer_large": 346_196_200,
    "adventurer_tiny_patch1": 24_207_880,
    "adventurer_small_patch1": 69_689_896,
    "adventurer_base_patch1": 136_454_728,
}

SMALL = {  # a small member of every family
    "vmamba": lambda **k: VMamba(num_classes=5, depths=(1, 2), dims=16, **k),
    "vanilla": lambda **k: VMamba(
        num_classes=5,
        depths=(1, 1, 1),
        dims=16,
        d_state=3,
        ssm_ratio=2.0,
        mlp_ratio=0.0,
        mixer={"gate": "act", "conv_bias": True},
        stem="patch",
        downsample="merge",
        **k,
    ),
    "heads": lambda **k: VMamba(
        num_classes=5, depths=(1, 1), dims=16, d_state=4, mixer={"heads": True, "dt_rank": 4}, **k
    ),
    "res_vmamba": lambda **k: ResVMamba(num_classes=5, depths=(1, 1, 1), dims=16, d_state=2, **k),
    "spatial_mamba": lambda **k: SpatialMamba(num_classes=5, depths=(1, 1), embed_dim=16, **k),
    "vim": lambda **k: Vim(num_classes=5, img_size=32, patch_size=8, embed_dim=16, depth=3, d_state=2, **k),
    "vim_rope": lambda **k: Vim(
        num_classes=5, img_size=32, patch_size=8, embed_dim=16, depth=2, d_state=2, rope="branch", **k
    ),
    "shuffle": lambda **k: ShuffleMamba(
        num_classes=5, img_size=32, patch_size=8, embed_dim=16, depth=3, d_state=2, **k
    ),
    "registers": lambda **k: ShuffleMambaReg(
        num_classes=5, img_size=32, patch_size=8, embed_dim=16, depth=2, d_state=2, n_registers=4, cls_reduce=2, **k
    ),
    "adventurer": lambda **k: Adventurer(
        num_classes=5, img_size=32, patch_size=8, embed_dim=32, depth=4, d_state=4, **k
    ),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    node = {k: v for k, v in read_model_config(name)["model"].items() if not (isinstance(v, str) and "${" in v)}
    with torch.device("meta"):
        model = build_model(node)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("size", [(33, 47), (64, 32)])
def test_any_size_and_every_parameter_learns(family, size):
    model = SMALL[family]()
    y = model(torch.randn(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()
    y.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("family", SMALL)
def test_initial_loss_is_that_of_guessing(family):
    model = SMALL[family]()
    loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 5)
    assert abs(loss.item() - math.log(5)) < 0.3


@pytest.mark.parametrize("family", SMALL)
def test_wrong_images_are_refused_in_words(family):
    model = SMALL[family]()
    with pytest.raises(ValueError, match="in_chans=1"):
        model(torch.randn(1, 1, 32, 32))
    with pytest.raises(ValueError, match="takes images of shape"):
        model(torch.randn(3, 32, 32))
    with pytest.raises(ValueError, match="takes normalised images as floats, got uint8"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    if "vmamba" not in family and family not in ("heads", "spatial_mamba"):
        with pytest.raises(ValueError, match="too small"):
            model(torch.randn(1, 3, 3, 32))


@pytest.mark.parametrize("family", SMALL)
def test_checkpointing_changes_nothing(family):
    model, x = SMALL[family](drop_path_rate=0.3).train(), torch.randn(2, 3, 32, 32)
    assert_checkpointing_changes_nothing(model, lambda: model(x).square().sum())


@pytest.mark.parametrize(
    "family", ["spatial_mamba", *(pytest.param(f, marks=pytest.mark.slow) for f in SMALL if f != "spatial_mamba")]
)
def test_compiles_to_one_graph(family):
    model, x = SMALL[family](), torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        model.train(mode)
        torch.compiler.reset()
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        got = torch.compile(model, fullgraph=True, backend="eager")(x)
        if not mode or family not in ("shuffle", "registers"):  # the draws of a compiled graph come in another order
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_reversing_a_map_exchanges_the_scan_directions():
    mixer = SS2D(8, d_state=2, ssm_ratio=1.0, gate=None)
    x = torch.randn(2, 8, 5, 3)
    flipped = SS2D(8, d_state=2, ssm_ratio=1.0, gate=None)
    flipped.load_state_dict(mixer.state_dict())
    for name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
        getattr(flipped, name).data.copy_(getattr(mixer, name)[[2, 3, 0, 1]])
    torch.testing.assert_close(flipped.scan(x.flip(2, 3)), mixer.scan(x).flip(1, 2), rtol=1e-4, atol=1e-5)


def test_spatial_mamba_fuses_with_the_weights_of_the_moment():
    model, x = SMALL["spatial_mamba"]().eval(), torch.randn(1, 3, 32, 32)
    before = model(x)
    with torch.no_grad():
        model.layers[0].blocks[0].self_attention.state_fusion.alpha[1] += 1.0
    assert (model(x) - before).abs().max() > 1e-6
    frozen = SpatialMamba(depths=(1,), embed_dim=16, freeze_batch_norm=True).train()
    assert not frozen.patch_embed.conv1.norm.training and frozen.layers.training


def test_shuffle_is_for_training_only_and_keeps_positions():
    model, x = SMALL["shuffle"](shuffle_rate=1.0), torch.randn(2, 3, 32, 32)
    perm = torch.stack([torch.randperm(17) for _ in range(3)])
    quiet = model.eval()(x)
    never, always = torch.ones(3), torch.zeros(3)
    torch.testing.assert_close(model.train()(x, never, perm), quiet, rtol=1e-5, atol=1e-6)
    assert (model(x, always, perm) - quiet).abs().max() > 1e-5
    permutations = draw_permutations(3, 17, 1.0, x.device, always, perm)
    assert torch.equal(permutations[0], torch.arange(17))  # the first layer never shuffles
    assert torch.equal(permutations[2], perm[2])
    for layer in model.layers:  # a layer that treats tokens one by one does not notice
        layer.mixer = torch.nn.Identity()
    torch.testing.assert_close(model(x, always, perm), model.eval()(x))


@pytest.mark.parametrize("layout,t", [("head", 1), ("middle", 1), ("tail", 1), ("double", 2), ("spread", 3)])
@pytest.mark.parametrize("m", [4, 9])
def test_tokens_come_out_where_they_went_in(layout, t, m):
    patches, tokens, indices = torch.randn(2, m, 3), torch.randn(1, t, 3), token_indices(layout, m, t)
    x = insert_tokens(patches, tokens, indices)
    back, out = split_tokens(x, indices)
    assert torch.equal(back, patches) and torch.equal(out, tokens.expand(2, -1, -1))


def test_positions_are_resized_around_the_class_token():
    model = SMALL["vim"]()
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 8] = 7.0  # the class token's row among 16 patches
    resized = model.positions(model.pos_embed, (3, 5))
    assert resized.shape == (1, 16, 16)
    assert torch.equal(resized[0, 7], torch.full((16,), 7.0)) and resized.sum() == 7 * 16
    state = model.state_dict()
    larger = Vim(num_classes=5, img_size=48, patch_size=8, embed_dim=16, depth=3, d_state=2)
    larger.load_state_dict(released_vim.from_official(larger, state))
    torch.testing.assert_close(larger.pos_embed[0, 18], torch.full((16,), 7.0))


def test_adventurer_flips_by_its_rule():
    flips = {
        rule: [b.flip for b in Adventurer(depth=8, embed_dim=32, img_size=16, flip_rule=rule, d_state=4).layers]
        for rule in FLIP_RULES
    }
    assert flips["released"] == [n in (2, 3) for n in range(8)]
    assert flips["every_two"] == [n in (2, 3, 6, 7) for n in range(8)]
    assert flips["every_other"] == [n in (1, 3, 5, 7) for n in range(8)]
    assert flips["never"] == [False] * 8
    assert len({tuple(rule) for rule in flips.values()}) == len(FLIP_RULES)


def test_adventurer_flips_the_patches_and_leaves_the_class_token_last():
    torch.manual_seed(1)
    block, x = AdventurerBlock(32, d_state=4, expand=2), torch.randn(2, 10, 32)
    mirrored = torch.cat([x[:, :-1].flip(1), x[:, -1:]], dim=1)
    as_it_is = block(mirrored)
    block.flip = True
    flipped = block(x)
    torch.testing.assert_close(flipped, torch.cat([as_it_is[:, :-1].flip(1), as_it_is[:, -1:]], dim=1))
    assert (flipped - AdventurerBlock.forward(block, mirrored)).abs().max() > 1e-4


def test_residual_path_of_res_vmamba():
    x = torch.randn(1, 3, 40, 24)
    plain = SMALL["res_vmamba"](fuse="none").eval()
    learned = SMALL["res_vmamba"]().eval()
    learned.load_state_dict(plain.state_dict(), strict=False)
    for conv in learned.fuse:
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    torch.testing.assert_close(learned(x), plain(x))
    random = SMALL["res_vmamba"](fuse="random").eval()
    assert (random(x) - random(x)).abs().max() > 0  # as released: new projections in every pass


def test_forward_types_and_their_grammar():
    assert parse_forward_type("v05_noz") == {"gate": None}
    assert parse_forward_type("v0") == parse_forward_type("v03") == {"gate": "act"}
    assert parse_forward_type("v052d_oncnorm_noz_oact") == {
        "gate": None,
        "out_act": "gelu",
        "out_norm": "layer_conv",
        "scans": "bidirectional",
    }
    with pytest.raises(ValueError, match="not in the order"):
        parse_forward_type("v05_oact_noz")
    with pytest.raises(ValueError, match="none of v0"):
        parse_forward_type("v2")


@pytest.mark.parametrize("tag", ["_onnone", "_ondwconv3", "_oncnorm", "_onsoftmax", "_onsigmoid"])
def test_output_norms_load_in_both_layouts(tag):
    arguments = dict(d_model=8, d_state=2, forward_type=f"v05{tag}_noz")
    first = parse_forward_type(arguments["forward_type"])
    mixer = SS2D(8, d_state=2, **first)
    names = {"out_norm.conv.weight": "out_norm.1.weight", "out_norm.1.conv.weight": "out_norm.2.weight"}
    state = {names.get(k, k): v for k, v in mixer.state_dict().items()}
    loaded = ssmzoo.load_official("vmamba", state, **arguments)
    x = torch.randn(1, 4, 5, 8)
    torch.testing.assert_close(loaded(x), mixer(x))
    loaded = ssmzoo.load_official("vmamba", state, channel_first=True, **arguments)
    torch.testing.assert_close(loaded(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), mixer(x))


def test_released_checkpoints_that_do_not_fit():
    state = SMALL["spatial_mamba"]().state_dict()
    kwargs = dict(dims=16, depths=[1, 1], num_classes=5)
    ssmzoo.load_official("spatial_mamba", state, **kwargs)
    with pytest.raises(CheckpointError, match="missing keys 1: norm.weight"):
        ssmzoo.load_official("spatial_mamba", {k: v for k, v in state.items() if k != "norm.weight"}, **kwargs)
    with pytest.raises(CheckpointError, match="num_classes is 7, but the tensors say 5"):
        ssmzoo.load_official("spatial_mamba", state, **(kwargs | {"num_classes": 7}))
    with pytest.raises(CheckpointError, match="unexpected keys 1: more$"):
        ssmzoo.load_official("spatial_mamba", state | {"more": torch.zeros(1)}, **kwargs)
    for family, more in (("spatial_mamba", kwargs), ("vmamba", {})):  # with a table where theirs has none, or another
        with pytest.raises(CheckpointError, match="looks like a checkpoint of family 'vim'"):
            ssmzoo.load_official(family, SMALL["vim"]().state_dict(), **more)
    with pytest.raises(ValueError, match="only d_state=1"):
        ssmzoo.load_official("spatial_mamba", state, **(kwargs | {"d_state": 2}))
    with pytest.raises(TypeError, match="depth"):
        ssmzoo.load_official("spatial_mamba", state, **(kwargs | {"depth": 2}))


@pytest.mark.parametrize("family", [f for f in SMALL if f not in ("vanilla", "heads", "vim_rope", "shuffle")])
def test_a_checkpoint_of_another_family_is_recognised(family):
    name = "shuffle_mamba" if family == "registers" else family
    assert looks_like(SMALL[family]().state_dict()).endswith(f"family {name!r}")


def test_old_names_of_the_first_vmamba_release():
    model = SMALL["vanilla"]()
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace(".op.", ".self_attention.")
        state[key.replace(".norm.", ".ln_1.") if ".blocks." in key and "out_norm" not in key else key] = value
    kwargs = dict(
        depths=[1, 1, 1],
        dims=16,
        num_classes=5,
        ssm_d_state=3,
        forward_type="v0",
        mlp_ratio=0.0,
        norm_layer="ln",
        downsample_version="v1",
    )
    x = torch.randn(1, 3, 36, 28)
    torch.testing.assert_close(ssmzoo.load_official("vmamba", state, **kwargs)(x), model.eval()(x))
