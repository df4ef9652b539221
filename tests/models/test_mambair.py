"""MambaIR, MambaIRv2 and the real-denoising U-Net: published sizes, odd pictures, initial values, refusals."""

import pytest
import torch
from toy import assert_checkpointing_changes_nothing

from ssmzoo import create_model
from ssmzoo.layers.image.restoration import mirror_pad
from ssmzoo.models.mambair import MambaIR
from ssmzoo.models.mambair_unet import MambaIRUNet
from ssmzoo.models.mambair_v2 import MambaIRv2
from ssmzoo.models.swinir import SwinIR
from ssmzoo.presets import list_models
from ssmzoo.released import mambair, mambair_v2

PUBLISHED = {  # preset -> parameters, from the papers' code
    "mambair_classic_x2": 20_421_863,
    "mambair_classic_x3": 20_606_503,
    "mambair_classic_x4": 20_569_575,
    "mambair_light_x2": 905_016,
    "mambair_light_x3": 913_131,
    "mambair_light_x4": 924_492,
    "mambair_denoise": 15_777_507,
    "mambair_jpeg": 15_771_025,
    "mambair_unet": 26_779_480,
    "mambair_v2_light_x2": 774_092,
    "mambair_v2_light_x3": 780_587,
    "mambair_v2_light_x4": 789_680,
    "mambair_v2_small_x2": 9_621_935,
    "mambair_v2_small_x3": 9_806_575,
    "mambair_v2_small_x4": 9_769_647,
    "mambair_v2_base_x2": 22_903_001,
    "mambair_v2_base_x3": 23_087_641,
    "mambair_v2_base_x4": 23_050_713,
    "mambair_v2_large_x2": 34_090_523,
    "mambair_v2_large_x3": 34_275_163,
    "mambair_v2_large_x4": 34_238_235,
    "mambair_v2_denoise": 22_657_971,
    "mambair_v2_jpeg": 22_651_705,
}
TINY = dict(embed_dim=32, depths=(1, 1), d_state=2, mlp_ratio=1.0)
TINY_V2 = TINY | dict(num_heads=2, window_size=4, inner_rank=4, num_tokens=5, routing="argmax")
TINY_SWIN = dict(embed_dim=32, depths=(2,), num_heads=2, window_size=4)


HEADS_ONLY = [n for n in PUBLISHED if n.endswith(("x3", "x4")) and "light" not in n]  # the body of x2


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HEADS_ONLY else n for n in PUBLISHED])
def test_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_every_preset_is_in_the_table():
    assert {n for n in list_models("mambair*")} - {"mambair", "mambair_v2"} == set(PUBLISHED)


@pytest.mark.parametrize(
    "upsampler, scale",
    [("", 1), ("pixelshuffle", 3), ("pixelshuffle", 4), ("pixelshuffledirect", 2), ("nearest+conv", 4)],
)
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (9, 6)])
def test_any_size_in_and_scale_times_that_out(upsampler, scale, size):
    x = torch.rand(2, 3, *size)
    models = [MambaIRv2(scale, upsampler, **TINY_V2), SwinIR(scale, upsampler, **TINY_SWIN)]
    if upsampler != "nearest+conv":
        models.append(MambaIR(scale, upsampler, **TINY))
    for model in models:
        assert model.eval()(x).shape == (2, 3, scale * size[0], scale * size[1])


@pytest.mark.parametrize(
    "model",
    [
        MambaIR(2, **TINY),
        MambaIR(1, in_chans=1, resi_connection="3conv", **TINY),
        MambaIRv2(2, **TINY_V2),
        MambaIRv2(2, light=True, **TINY_V2),
        SwinIR(2, **TINY_SWIN),
        MambaIR(2, cab="convolution", **TINY),
    ],
)
def test_every_parameter_receives_a_gradient(model):
    model.train()(torch.rand(2, model.in_chans, 8, 8)).square().sum().backward()
    attention = [n for n, p in model.named_parameters() if "attention.attention" in n]
    without = [n for n, p in model.named_parameters() if p.grad is None and n not in attention]
    assert not without


@pytest.mark.parametrize(
    "build",
    [
        lambda: MambaIR(2, drop_path_rate=0.0, **TINY),
        lambda: MambaIRv2(2, **TINY_V2),
        lambda: SwinIR(2, drop_path_rate=0.0, **TINY_SWIN),
    ],
)
def test_grad_checkpointing_changes_no_gradient(build):
    model, x = build().train(), torch.rand(1, 3, 6, 6)
    assert_checkpointing_changes_nothing(model, lambda: model(x).square().sum())


def test_the_window_attention_twin_has_as_many_parameters_and_sees_beyond_a_window():
    counts = [
        sum(p.numel() for p in create_model(name, upscale=2, in_chans=3).parameters()) for name in ("mambair", "swinir")
    ]
    assert abs(counts[0] - counts[1]) < 0.002 * counts[0]
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    SwinIR(2, **TINY_SWIN).eval()(x)[0, 0, 0, 0].backward()
    reached = x.grad.abs().sum(1)[0] > 0
    assert reached[:8, :8].any() and reached[5, 5]  # outside the first window of 4: the second block is shifted


def test_what_an_ablation_leaves_out_takes_its_parameters_along():
    names = {
        cab: {n for n, _ in MambaIR(2, cab=cab, **TINY).named_parameters() if "conv_blk" in n}
        for cab in ("both", "convolution", "attention")
    }
    assert names["convolution"] < names["both"] and len(names["attention"]) == 2 * 4  # two blocks, two 1x1 with bias
    with pytest.raises(ValueError, match="cab is 'none'"):
        MambaIR(2, cab="none", **TINY)


def test_bicubic_skip_starts_as_bicubic_enlargement_or_the_picture_itself():
    from ssmzoo.ops.imresize import imresize

    x = torch.rand(1, 3, 7, 9)
    with torch.no_grad():
        for model in (MambaIR(2, bicubic_skip=True, **TINY), MambaIRv2(2, bicubic_skip=True, **TINY_V2)):
            assert (model.eval()(x) - imresize(x, 2.0)).abs().max() < 0.05
        assert (MambaIR(1, bicubic_skip=True, **TINY).eval()(x) - x).abs().max() < 0.05


def test_batch_members_do_not_mix():
    for model in (MambaIR(2, **TINY), MambaIRv2(2, **TINY_V2)):
        x = torch.rand(3, 3, 6, 5)
        with torch.no_grad():
            together, alone = model.eval()(x), torch.cat([model(v[None]) for v in x])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_img_range_scales_the_residual_head_inside_only():
    torch.manual_seed(0)
    model = MambaIR(1, img_range=255.0, **TINY).eval()
    with torch.no_grad():
        model.conv_last.weight.zero_()
        model.conv_last.bias.zero_()
        x = torch.rand(1, 3, 5, 5)
        torch.testing.assert_close(model(x), x, atol=1e-5, rtol=1e-5)


def test_mirror_padding_repeats_the_edge_and_goes_on_for_tiny_pictures():
    x = torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3)
    assert mirror_pad(x, 4)[0, 0, 0].tolist() == [1, 2, 3, 3]
    assert mirror_pad(x[..., :1], 4).flatten().tolist() == [1] * 16
    assert mirror_pad(x[..., :2], 8)[0, 0, 0].tolist() == [1, 2, 2, 1, 1, 2, 2, 1]


def test_initial_values_are_the_cards():
    torch.manual_seed(0)
    model = MambaIR(2, embed_dim=60, depths=(2, 2), d_state=10, mlp_ratio=1.2, drop_path_rate=0.3)
    block = model.layers[1].residual_group["blocks"][1]
    scan = block.self_attention
    near = 4 / (2 * scan.in_proj.weight.numel()) ** 0.5  # four standard errors of a deviation
    assert scan.in_proj.weight.std().item() == pytest.approx(0.02, rel=near)
    assert torch.equal(scan.A_logs, torch.arange(1, 11.0).log().expand(4 * 72, 10))
    assert bool((scan.Ds == 1).all()) and bool((block.skip_scale == 1).all())
    dt = torch.nn.functional.softplus(scan.dt_projs_bias)
    assert 1e-3 * 0.99 <= dt.min() and dt.max() <= 0.1 * 1.01
    assert scan.dt_projs_weight.abs().max() <= 4**-0.5
    assert block.drop_path.p == pytest.approx(0.3) and model.layers[0].residual_group["blocks"][0].drop_path.p == 0
    layer = MambaIRv2(2, **TINY_V2).layers[0].residual_group["layers"][0]
    assert bool((layer.scale1 == 1e-4).all())
    assert layer.embeddingA.weight.abs().max() <= 1 / 4 and layer.assm.embeddingB.weight.abs().max() <= 1 / 5


def test_routing_argmax_repeats_and_gumbel_does_not():
    x = torch.rand(1, 3, 8, 8)
    quiet, noisy = MambaIRv2(2, **TINY_V2).eval(), MambaIRv2(2, **TINY_V2 | dict(routing="gumbel")).eval()
    with torch.no_grad():
        assert torch.equal(quiet(x), quiet(x))
        for layer in (m for m in noisy.modules() if hasattr(m, "embeddingB")):
            layer.embeddingB.weight.normal_()
        assert not torch.equal(noisy(x), noisy(x))
        torch.manual_seed(1)
        first = noisy(x)
        torch.manual_seed(1)
        assert torch.equal(first, noisy(x))


def test_released_files_load_with_their_index_buffer_and_another_window_is_refused():
    from ssmzoo.layers.image.window_attention import relative_position_index

    kwargs = {k: v for k, v in TINY_V2.items() if k != "routing"}
    state = MambaIRv2(2, "pixelshuffle", **TINY_V2).state_dict()
    state["relative_position_index_SA"] = relative_position_index(4)
    module, mapped = mambair_v2.official(dict(state), upscale=2, upsampler="pixelshuffle", **kwargs)
    module.load_state_dict(mapped)
    state["relative_position_index_SA"] = relative_position_index(4) + 1
    with pytest.raises(ValueError, match="relative_position_index_SA"):
        mambair_v2.official(dict(state), upscale=2, upsampler="pixelshuffle", **kwargs)


def test_squeeze_factor_and_state_sizes_are_read_off_a_unet_checkpoint():
    unet = MambaIRUNet(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, d_state=(2, 3, 4, 5), squeeze_factor=4)
    module, state = mambair.official(
        unet.state_dict(), dim=8, num_blocks=[1, 1, 1, 1], num_refinement_blocks=1, mlp_ratio=1.5
    )
    module.load_state_dict(state)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: MambaIR(5, "pixelshuffle", **TINY), "power of 2"),
        (lambda: MambaIR(2, "", **TINY), "no upsampler"),
        (lambda: MambaIR(2, "nearest", **TINY), "expected"),
        (lambda: MambaIR(2, **TINY | dict(embed_dim=20)), "squeeze_factor"),
        (lambda: MambaIR(2, resi_connection="2conv", **TINY), "1conv"),
        (lambda: MambaIRv2(2, **TINY_V2 | dict(num_heads=5)), "divisible"),
        (lambda: MambaIRv2(2, **TINY_V2 | dict(num_heads=(2, 2, 2))), "num_heads"),
        (lambda: MambaIRv2(2, **TINY_V2 | dict(routing="sample")), "routing"),
        (lambda: MambaIR(2, **TINY)(torch.rand(1, 4, 8, 8)), "3, height"),
        (
            lambda: MambaIRUNet(dim=8, squeeze_factor=4, num_blocks=(1, 1, 1, 1))(torch.rand(1, 3, 9, 8)),
            "multiples of 8",
        ),
    ],
)
def test_bad_arguments_are_refused_in_words(build, words):
    with pytest.raises(ValueError, match=words):
        build()
