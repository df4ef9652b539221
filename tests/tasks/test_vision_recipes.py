"""The papers' training recipes as configurations: rates, batches, augmentation; every one of them can be composed."""

import math
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir

from ssmzoo.presets import config_dir, config_names
from ssmzoo.train.config import check, register_resolvers
from ssmzoo.train.optim import build, parameter_roles, schedule
from ssmzoo.zoo import create_model

EPOCH = 1_281_167  # training images of ImageNet
RECIPES = {  # images per step, learning rate, weight decay, warm-up epochs, epochs, clip, decay of the average
    "swin": (1024, 1e-3, 0.05, 20, 300, 5.0, 0.9999),
    "spatial_mamba": (1024, 1e-3, 0.05, 20, 300, 5.0, 0.9999),
    "deit": (1024, 1e-3, 0.1, 5, 300, None, 0.99996),
    "vim_small": (512, 1e-3, 0.05, 5, 300, None, 0.99996),
    "vim_plus": (1024, 1e-5, 1e-8, 0, 30, None, 0.99996),
    "shuffle_mamba": (2048, 2e-3, 0.1, 30, 300, 3.0, 0.9999),
    "adventurer_pretrain": (1024, 1e-3, 0.05, 5, 300, None, 0.99996),
    "adventurer_mid": (1024, 1e-3, 0.05, 5, 100, None, 0.99996),
    "adventurer_finetune": (512, 1e-5, 0.1, 5, 20, None, 0.99996),
    "shuffle_mamba_reg_pretrain": (1024, 1e-3, 0.05, 5, 300, None, 0.99996),
    "shuffle_mamba_reg_mid": (1024, 4e-4, 0.05, 5, 100, None, 0.99996),
    "shuffle_mamba_reg_finetune": (512, 1e-5, 0.1, 5, 20, None, 0.99996),
}
MODELS = {
    "swin": "vmamba_tiny",
    "spatial_mamba": "spatial_mamba_tiny",
    "deit": "vim_tiny",
    "vim_small": "vim_small",
    "vim_plus": "vim_tiny_plus",
    "shuffle_mamba": "shuffle_mamba_base",
}


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        cfg = compose("train", overrides=list(overrides))
    check(cfg)
    return cfg


@cache
def recipe(name):
    model = MODELS.get(name, "adventurer_tiny" if "adventurer" in name else "shuffle_mamba_reg_base")
    return composed(f"model={model}", f"experiment=imagenet/{name}")


def test_every_imagenet_recipe_is_known():
    assert {n.partition("/")[2] for n in config_names("experiment") if n.startswith("imagenet/")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_numbers_of_its_paper(name, monkeypatch):
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    images, rate, decay, warmup, epochs, clip, average = RECIPES[name]
    cfg = recipe(name)
    assert cfg.data.batch_size * cfg.trainer.devices == images and cfg.trainer.max_epochs == epochs
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.trainer.gradient_clip_val) == (rate, decay, clip)
    assert cfg.optim.warmup_steps == pytest.approx(warmup * (EPOCH // images), rel=0.001)
    assert cfg.callbacks.ema.decay == average and (cfg.task.mixup, cfg.task.cutmix) == (0.8, 1.0)
    three = "finetune" not in name and name.startswith(("adventurer", "shuffle_mamba_reg"))
    assert bool(cfg.data.augment.get("three_augment")) == three
    assert cfg.task.label_smoothing == (0.0 if three else 0.1)
    assert ("auto_augment" in cfg.data.augment) == (not three)
    assert cfg.data.crop_pct == (1.0 if name == "shuffle_mamba_reg_finetune" else 0.875)


@pytest.mark.parametrize(
    "name", ["claims/spatial_mamba", "claims/layer_shuffle", "fscil/cifar100", "fscil/mini_imagenet", "fscil/cub200"]
)
def test_other_experiments_can_be_composed(name):
    cfg = composed(f"experiment={name}", "++data.path=/data/images")
    assert cfg.model._target_.startswith("ssmzoo.models.") and cfg.trainer.max_steps > 0


RATES = {  # learning rate at the first step, and at the last; what decays; how often an image is drawn in an epoch
    "swin": (1e-6, 1e-5, 1),
    "spatial_mamba": (1e-6, 1e-5, 1),
    "deit": (1e-6, 1e-5, 3),
    "vim_small": (1e-6, 1e-5, 3),
    "vim_plus": (1e-5, 1e-5, 3),
    "shuffle_mamba": (5e-7, 5e-6, 3),
    "adventurer_pretrain": (1e-6, 1e-5, 3),
    "adventurer_finetune": (1e-6, 1e-7, 1),
    "shuffle_mamba_reg_mid": (1e-6, 4e-6, 3),
}


@pytest.mark.parametrize("name", RATES)
def test_recipe_begins_and_ends_with_the_rates_of_its_paper(name, monkeypatch):
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    cfg = recipe(name)
    images, epochs = cfg.data.batch_size * cfg.trainer.devices, cfg.trainer.max_epochs
    steps = epochs * (EPOCH // images)
    made = build(torch.nn.Linear(2, 2), total_steps=steps, **cfg.optim)
    rate, first, last = made["lr_scheduler"]["scheduler"].lr_lambdas[0], *RATES[name][:2]
    assert cfg.optim.lr * rate(0) == pytest.approx(first)
    assert cfg.optim.lr * rate(steps - 1) == pytest.approx(last, rel=0.03, abs=1e-7)  # stairs end above the floor
    assert cfg.data.get("repeats", 1) == RATES[name][2] and cfg.optim.decay == "shape"
    if cfg.optim.get("stair_steps", 1) > 1:
        assert cfg.optim.stair_steps == EPOCH // images and rate(0) == rate(cfg.optim.stair_steps - 1)


def test_warm_up_beside_or_under_the_cosine():
    after, under = (schedule("cosine", 100, 20, 0.1, warmup_lr_ratio=0.01, warmup_prefix=p) for p in (True, False))
    assert after(0) == under(0) == 0.01 and after(10) == pytest.approx(0.505)
    assert after(20) == 1 and under(20) == pytest.approx(0.1 + 0.45 * (1 + math.cos(0.2 * math.pi)))
    assert after(100) == under(100) == pytest.approx(0.1)
    stairs = schedule("cosine", 100, 20, 0.1, stair_steps=10, cooldown_steps=5)
    assert stairs(39) == stairs(30) != stairs(40) and stairs(95) == pytest.approx(0.01)


def test_which_parameters_decay():
    model = create_model("spatial_mamba_tiny", depths=(1,), embed_dim=8)
    mixer = "layers.0.blocks.0.self_attention."
    roles, shape, every = (parameter_roles(model, rule) for rule in ("roles", "shape", "all"))
    assert roles[mixer + "A_logs"] != "decay" and shape[mixer + "A_logs"] == "decay"
    assert roles[mixer + "state_fusion.kernel_3"] == shape[mixer + "state_fusion.kernel_3"] == "decay"
    assert shape[mixer + "Ds"] == shape[mixer + "conv2d.bias"] == "one dimension" and set(every.values()) == {"decay"}
    vim = parameter_roles(create_model("vim_tiny", depth=1, embed_dim=16), "shape")
    assert vim["layers.0.mixer.A_b_log"] == "decay" and vim["pos_embed"] == "position"
    with pytest.raises(ValueError, match="optim.decay is 'shapes'.*nearest: shape"):
        parameter_roles(model, "shapes")


def test_a_part_of_a_model_learns_slower():
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "neck": torch.nn.Linear(2, 2)})
    groups = build(model, total_steps=5, lr=0.2, lr_scale={"backbone": 0.1})["optimizer"].param_groups
    assert sorted({g["initial_lr"] for g in groups}) == pytest.approx([0.02, 0.2])
    with pytest.raises(ValueError, match="no parameter's name begins with 'bone'"):
        build(model, total_steps=5, lr_scale={"bone": 0.1})


def test_base_session_of_cifar100():
    cfg = composed("experiment=fscil/cifar100")
    model = torch.nn.Linear(2, 2)
    rate = build(model, total_steps=cfg.trainer.max_steps, **cfg.optim)["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [rate(0), rate(100), rate(11_709), rate(11_710)] == pytest.approx([0.1, 1, 0.01, 0.001], rel=1e-3)
    assert (cfg.task.base_mixup, cfg.task.base_cutmix) == (0.8, 1.0) and cfg.optim.name == "sgd"
