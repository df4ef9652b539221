"""The published recipes: numbers of the option files, schedules, mixup, the metrics of real noise, recomputation."""

import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from toy import assert_checkpointing_changes_nothing

from ssmzoo.models.mambair_unet import MambaIRUNet
from ssmzoo.presets import config_dir
from ssmzoo.tasks.metrics.image import gaussian_blur_volume, ssim_volume
from ssmzoo.tasks.restoration import Restoration, mixed
from ssmzoo.train.config import check, register_resolvers
from ssmzoo.train.optim import build, schedule

THOUSANDS = {
    500: [250, 400, 450, 475],
    250: [125, 200, 225, 237.5],
    1600: [800, 1200, 1400, 1500],
    800: [400, 600, 700, 750],
}
RECIPES = {  # name: (model, patch, batch, rate, thousands of steps, charbonnier, seed)
    "classic_x2": ("mambair_classic_x2", 128, 32, 2e-4, 500, False, 10),
    "classic_x3": ("mambair_classic_x3", 192, 64, 1e-4, 250, False, 10),
    "classic_x4": ("mambair_classic_x4", 192, 32, 1e-4, 250, False, 10),
    "light_x2": ("mambair_light_x2", 128, 32, 2e-4, 500, False, 10),
    "light_x4": ("mambair_light_x4", 192, 32, 2e-4, 500, False, 10),
    "denoise_15": ("mambair_denoise", 128, 16, 2e-4, 1600, True, 10),
    "denoise_25": ("mambair_denoise", 128, 16, 1e-4, 800, True, 10),
    "jpeg_40": ("mambair_jpeg", 126, 16, 2e-4, 1600, True, 42),
    "jpeg_30": ("mambair_jpeg", 126, 16, 1e-4, 800, True, 42),
    "v2_base_x2": ("mambair_v2_base_x2", 128, 32, 1e-3, 500, False, 10),
    "v2_light_x2": ("mambair_v2_light_x2", 128, 32, 2e-4, 500, False, 10),
}


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    model = cfg.hydra.runtime.choices.model
    del cfg.hydra
    check(cfg)
    return cfg, model


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_numbers_of_the_released_option_files(name):
    preset, patch, batch, rate, thousands, charbonnier, seed = RECIPES[name]
    cfg, model = composed(f"experiment=restoration/{name}")
    assert (model, cfg.data.patch_size, cfg.data.batch_size, cfg.seed) == (preset, patch, batch, seed)
    o = cfg.optim
    assert (o.name, o.lr, list(o.betas), o.weight_decay) == ("adam", rate, [0.9, 0.99], 0)
    assert (o.schedule_kind, o.gamma, o.warmup_steps) == ("multistep", 0.5, 0)
    assert list(o.milestones) == [1000 * m for m in THOUSANDS[thousands]]
    assert cfg.trainer.max_steps == 1000 * thousands and cfg.trainer.gradient_clip_val is None
    assert (cfg.task.get("loss", "l1") == "charbonnier") == charbonnier and cfg.callbacks.ema is None


@pytest.mark.parametrize(
    "name, other",
    [
        ("classic_x4", "mambair_v2_base_x3"),
        ("light_x4", "mambair_light_x3"),
        ("denoise_15", "mambair_v2_denoise"),
        ("jpeg_30", "mambair_v2_jpeg"),
    ],
)
def test_the_same_recipe_trains_another_scale_or_the_second_version(name, other):
    cfg, model = composed(f"experiment=restoration/{name}", f"model={other}")
    assert model == other and cfg.optim.lr == RECIPES[name][3]
    assert "x3" not in other or cfg.data.scale == cfg.model.upscale == 3


def test_the_recipe_of_real_noise():
    cfg, model = composed("experiment=restoration/real_denoise")
    o, stages = cfg.optim, cfg.data.patch_schedule
    assert model == "mambair_unet" and sum(s[2] for s in stages) == cfg.trainer.max_steps == 300_000
    assert [s[0] for s in stages] == [128, 160, 192, 256, 320, 384]
    assert [s[1] for s in stages] == [8 * n for n in (8, 5, 4, 2, 1, 1)]  # eight GPUs
    assert cfg.trainer.gradient_clip_val == 0.01 and cfg.task.mixup == 1.2 and not cfg.task.rounded
    rate = schedule(o.schedule_kind, 300_000, o.warmup_steps, o.min_lr_ratio, hold_steps=o.hold_steps)
    assert rate(0) == rate(91_999) == 1 and o.lr * rate(300_000) == pytest.approx(1e-6, rel=1e-3)
    assert rate(92_000 + 104_000) == pytest.approx(0.5, abs=0.01)
    optimizer = build(torch.nn.LayerNorm(4), total_steps=300_000, **o)["optimizer"]
    assert type(optimizer).__name__ == "AdamW" and [g["weight_decay"] for g in optimizer.param_groups] == [1e-4]


def test_mixup_blends_both_pictures_alike_in_half_of_the_steps():
    torch.manual_seed(0)
    x, changed = torch.rand(4, 3, 5, 5), 0
    for _ in range(200):
        lq, gt = mixed(x, 2 * x, 1.2)
        torch.testing.assert_close(gt, 2 * lq)
        changed += not torch.equal(lq, x)
    assert 60 < changed < 130  # half of them, less those that draw the order they had
    assert mixed(x, x, 0.0)[0] is x
    with pytest.raises(ValueError, match="mixup"):
        Restoration(torch.nn.Identity(), mixup=-1.0)


def test_ssim_of_a_volume_filters_all_three_axes_with_repeated_borders():
    x = torch.zeros(3, 13, 13, dtype=torch.float64)
    x[1, 6, 6] = 1
    taps = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / 4.5)
    taps = taps / taps.sum()
    assert gaussian_blur_volume(x)[1, 6, 6] == pytest.approx(taps[5].item() ** 3)
    assert gaussian_blur_volume(x)[0, 6, 6] == pytest.approx(taps[5].item() ** 2 * taps[4].item())
    constant = torch.full((3, 9, 8), 7.0, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur_volume(constant), constant)
    a = 255 * torch.rand(3, 16, 16)
    assert ssim_volume(a, a) == pytest.approx(1) and ssim_volume(a, 255 - a) < 0.2


def test_real_noise_is_measured_on_unrounded_levels():
    model = torch.nn.Identity()
    model.upscale = 1
    a = torch.full((3, 16, 16), 0.5)
    b = a + 0.3 / 255
    rounded, exact = (
        Restoration(model, rounded=r, y_channel=False, baseline="none").measure(b, a) for r in (True, False)
    )
    assert rounded["psnr"] == math.inf and exact["psnr"] == pytest.approx(20 * math.log10(255 / 0.3), abs=1e-3)


def test_the_unet_may_recompute_its_blocks():
    model = MambaIRUNet(dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, d_state=2, squeeze_factor=4).train()
    x = torch.rand(1, 3, 8, 8)
    assert_checkpointing_changes_nothing(model, lambda: model(x).square().sum())
