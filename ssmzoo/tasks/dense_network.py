"""A backbone's configuration inside that of a network for dense prediction."""

from __future__ import annotations

from torch import nn

from ssmzoo.layers.image.backbone import ImageBackbone
from ssmzoo.presets import list_models, model_class, read_model_config


def dense_network(network: type[nn.Module], node: dict, arguments: dict, sizes: dict[str, int]) -> dict:
    """The node of `network` around the backbone of `node`; a node that is one already stays as it is.

    Raises ValueError for a model without feature maps.
    """
    target, called = f"{network.__module__}.{network.__name__}", model_class(node["_target_"])
    if issubclass(called, network):
        return node
    if not issubclass(called, ImageBackbone):
        raise ValueError(
            f"{called.__name__} has no feature maps for dense prediction; take an image backbone: "
            f"model={', '.join(backbones())}, or one of their sizes (`ssmzoo list models`)"
        )
    return {"_target_": target, "backbone": node | {"num_classes": 0}, "num_classes": sizes["num_classes"]} | arguments


def backbones() -> list[str]:
    """Names of the image backbones' base configurations."""
    targets = {n: read_model_config(n)["model"]["_target_"] for n in list_models(task="classification")}
    first = [n for n, t in targets.items() if n == t.split(".")[-2]]  # the configuration that bears its file's name
    return [n for n in first if issubclass(model_class(targets[n]), ImageBackbone)]
