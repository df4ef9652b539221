"""What the released image models share: classifier or pyramid, names of norms, position tables of another size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ssmzoo.layers.image.backbone import FeaturePyramid, FourStage
from ssmzoo.layers.image.patch_embed import resize_map
from ssmzoo.layers.norm import RMSNorm
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.infer import count

RUNNER = {  # what timm's create_model and the training scripts give to every model
    "drop_block_rate": (None, "what a training script gives to every model; the class has no such layer"),
    "pretrained": (False, "where the official code looks for weights; the file is given"),
    "pretrained_cfg": (None, "timm's notes on the weights"),
    "pretrained_cfg_overlay": (None, "timm's notes on the weights"),
}
LOADED = {"pretrained": (None, "where the official code looks for weights; the file is given")}


def is_pyramid(state: dict[str, Tensor], given) -> bool:
    """Is it a backbone with a norm per stage, by its keys or because out_indices are given?"""
    return "out_indices" in given or any(key.startswith("outnorm") for key in state)


def official_stages(build: Callable[[dict], FourStage], state: dict[str, Tensor], config: dict):
    """A whole classifier, or its feature pyramid if `config` has out_indices; `build(config)` makes the classifier."""
    model = build(config)
    if "pos_embed" in state and getattr(model, "pos_embed", None) is not None:
        state["pos_embed"] = resize_map(state["pos_embed"], model.pos_embed.shape[1:3])
    if "out_indices" not in config:
        return model, state
    model = FeaturePyramid(model, config["out_indices"], official_norm(config.get("norm_layer", "ln")))
    kept = model.state_dict()
    state = {key if key.startswith("outnorm") else f"backbone.{key}": value for key, value in state.items()}
    cut = ("backbone.layers", "backbone.norm", "backbone.head")  # what no tap needs
    return model, {key: value for key, value in state.items() if key in kept or not key.startswith(cut)}


def one_of(config: dict, name: str, choices: dict):
    """The meaning of config[name] among `choices`; ValueError names the valid ones."""
    if config[name] not in choices:
        raise ValueError(f"{name} is {config[name]!r}; choose one of {', '.join(map(str, choices))}")
    return choices[config[name]]


def with_bias(linear: nn.Module) -> nn.Linear:
    """A linear layer of the same size that has a bias."""
    return nn.Linear(linear.in_features, linear.out_features)


def act_name(act) -> str:
    """'silu' from 'silu', nn.SiLU or a description such as 'gelu (class torch.nn.GELU)'."""
    name = act if isinstance(act, str) else getattr(act, "__name__", type(act).__name__)
    return name.split()[0].lower()


def official_norm(norm_layer) -> str:
    """'ln' or 'bn' from the released 'ln', 'ln2d', 'bn' or a class."""
    return "bn" if "bn" in act_name(norm_layer) or "batch" in act_name(norm_layer) else "ln"


def set_eps(model: nn.Module, eps: float) -> nn.Module:
    """Give all norms of a model another epsilon (1e-5 in everything published)."""
    for module in model.modules():
        if isinstance(module, (RMSNorm, nn.LayerNorm)):
            module.eps = eps
    return model


class ChannelsFirst(nn.Module):
    """A channels-last module for (b d y x) maps."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def resize_plain_positions(model, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `PlainBackbone` with its position table resized to this model's grid."""
    state = dict(state)
    table = state.get("pos_embed")
    if table is not None and model.pos_embed is not None and table.shape[1] != model.pos_embed.shape[1]:
        side = round((table.shape[1] - (model.pos_embed.shape[1] - model.grid[0] * model.grid[1])) ** 0.5)
        state["pos_embed"] = model.positions(table, model.grid, built=(side, side))
    return state


def layer_norms(model: nn.Module, rms_norm: bool, eps: float) -> nn.Module:
    """The model with LayerNorm for every RMSNorm unless `rms_norm`, and this epsilon in all of them."""
    for path, module in list(model.named_modules()):
        if type(module) is RMSNorm and not rms_norm:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.LayerNorm(len(module.weight)))
    return set_eps(model, eps)


def infer_plain(state: dict[str, Tensor], given, tokens: int, stride: int | None) -> dict[str, Any]:
    """What the tensors of a plain encoder tell. tokens: how many rows of the position table are no patches; stride: of
    the patches when it is not given (None: they touch). Only square images can be inferred from a table."""
    if "patch_embed.proj.weight" not in state:
        return {}
    d, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    inferred = {"embed_dim": d, "channels": channels, "patch_size": patch, "depth": count(state, "layers.#.")}
    inferred["rms_norm"] = "norm_f.bias" not in state
    if "head.weight" in state:
        inferred["num_classes"] = len(state["head.weight"])
    if "pos_embed" in state and given.get("img_size") is None:
        patches = state["pos_embed"].shape[1] - tokens
        side = round(patches**0.5)
        if side**2 != patches:
            raise CheckpointError(f"img_size must be given as (height, width): {patches} positions make no square")
        inferred["img_size"] = (side - 1) * (given.get("stride") or stride or patch) + patch
    return inferred
