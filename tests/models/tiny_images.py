"""A tiny build of every image and restoration preset, found in configs/model; equal ones once."""

import functools
import inspect

import torch

from ssmzoo.presets import build_model, list_models, model_class, read_model_config

TASKS = ("classification", "restoration", "fscil")
TINY = {  # what to make small, where a constructor has such an argument
    "depth": 2,
    "d_state": 2,
    "img_size": 32,
    "drop_path_rate": 0.0,
    "num_blocks": (1, 1, 1, 1),
    "num_refinement_blocks": 1,
    "squeeze_factor": 4,
    "n_registers": 4,
    "cls_reduce": 2,
    "num_heads": 2,
    "window_size": 4,
    "inner_rank": 3,
    "num_tokens": 4,
    "routing": "argmax",
}


def tiny_node(name: str) -> dict:
    """The preset's class and constructor arguments, shrunk."""
    node = read_model_config(name)["model"]
    node = {k: v for k, v in node.items() if not (isinstance(v, str) and "${" in v)}
    parameters = inspect.signature(model_class(node["_target_"])).parameters
    restores = read_model_config(name)["task"] == "restoration"
    node |= {k: v for k, v in TINY.items() if k in parameters}
    if "num_classes" in parameters:
        node["num_classes"] = 5
    if "depths" in parameters:
        stages = len(node.get("depths", parameters["depths"].default))
        node["depths"] = (1,) if restores else (1,) * min(stages, 3)
    for width in ("embed_dim", "dims", "dim"):
        if width in parameters:
            node[width] = 32 if node["_target_"].endswith("Adventurer") else 16  # its mixer has heads of 64 channels
    if isinstance(node.get("patch_size"), int) and "depth" in parameters:
        node["patch_size"] = 8
    return node


@functools.cache
def tiny_models() -> dict[str, dict]:
    """{preset: node}, of presets with the same class and the same modules the first one."""
    found: dict[tuple, tuple[str, dict]] = {}
    for name in list_models():
        if read_model_config(name)["task"] in TASKS:
            node = tiny_node(name)
            modules = tuple((n, type(m)) for n, m in build_model(node).named_modules())
            found.setdefault((node["_target_"], modules), (name, node))
    return dict(found.values())


def build(node: dict, dtype: torch.dtype = torch.float32):
    """The model in eval mode, and two pictures for it."""
    torch.manual_seed(0)
    model = build_model(node).to(dtype).eval()
    restores = "num_classes" not in inspect.signature(type(model)).parameters
    channels = node.get("in_chans", node.get("inp_channels", 3))
    side = 8 if restores else 32
    return model, torch.rand(2, channels, side, side, dtype=dtype)
