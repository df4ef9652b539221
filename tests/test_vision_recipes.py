"""The papers' training recipes as configurations: rates, batches, augmentation; every one of them can be composed."""

import pytest
from hydra import compose, initialize_config_dir

from ssmzoo.train.config import check, register_resolvers
from ssmzoo.zoo import config_dir, config_names

EPOCH = 1_281_167  # training images of ImageNet
RECIPES = {  # images per step, learning rate, weight decay, warm-up epochs, epochs, clip, decay of the average
    "swin": (1024, 1e-3, 0.05, 20, 300, 5.0, 0.9999), "spatial_mamba": (1024, 1e-3, 0.05, 20, 300, 5.0, 0.9999),
    "deit": (1024, 1e-3, 0.1, 5, 300, None, 0.99996), "vim_small": (512, 1e-3, 0.05, 5, 300, None, 0.99996),
    "vim_plus": (1024, 1e-5, 1e-8, 5, 30, None, 0.99996), "shuffle_mamba": (2048, 2e-3, 0.1, 30, 300, 3.0, 0.9999),
    "adventurer_pretrain": (1024, 1e-3, 0.05, 5, 300, None, 0.99996),
    "adventurer_mid": (1024, 1e-3, 0.05, 5, 100, None, 0.99996),
    "adventurer_finetune": (512, 1e-5, 0.1, 5, 20, None, 0.99996),
    "shuffle_mamba_reg_pretrain": (1024, 1e-3, 0.05, 5, 300, None, 0.99996),
    "shuffle_mamba_reg_mid": (1024, 4e-4, 0.05, 5, 100, None, 0.99996),
    "shuffle_mamba_reg_finetune": (512, 1e-5, 0.1, 5, 20, None, 0.99996),
}
MODELS = {"swin": "vmamba_tiny", "spatial_mamba": "spatial_mamba_tiny", "deit": "vim_tiny", "vim_small": "vim_small",
          "vim_plus": "vim_tiny_plus", "shuffle_mamba": "shuffle_mamba_base"}


def composed(*overrides):
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        cfg = compose("train", overrides=list(overrides))
    check(cfg)
    return cfg


def test_every_imagenet_recipe_is_known():
    assert {n.partition("/")[2] for n in config_names("experiment") if n.startswith("imagenet/")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_has_the_numbers_of_its_paper(name, monkeypatch):
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    images, rate, decay, warmup, epochs, clip, average = RECIPES[name]
    model = MODELS.get(name, "adventurer_tiny" if "adventurer" in name else "shuffle_mamba_reg_base")
    cfg = composed(f"model={model}", f"experiment=imagenet/{name}")
    assert cfg.data.batch_size * cfg.trainer.devices == images and cfg.trainer.max_epochs == epochs
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.trainer.gradient_clip_val) == (rate, decay, clip)
    assert cfg.optim.warmup_steps == pytest.approx(warmup * (EPOCH // images), rel=0.001)
    assert cfg.callbacks.ema.decay == average and (cfg.task.mixup, cfg.task.cutmix) == (0.8, 1.0)
    three = "finetune" not in name and name.startswith(("adventurer", "shuffle_mamba_reg"))
    assert bool(cfg.data.augment.get("three_augment")) == three
    assert cfg.task.label_smoothing == (0.0 if three else 0.1)
    assert ("auto_augment" in cfg.data.augment) == (not three)
    assert cfg.data.crop_pct == (1.0 if name == "shuffle_mamba_reg_finetune" else 0.875)


@pytest.mark.parametrize("name", ["claims/spatial_mamba", "claims/layer_shuffle", "fscil/cifar100",
                                  "fscil/mini_imagenet", "fscil/cub200"])
def test_other_experiments_can_be_composed(name):
    cfg = composed(f"experiment={name}", "++data.path=/data/images")
    assert cfg.model._target_.startswith("ssmzoo.models.") and cfg.trainer.max_steps > 0
