"""config.json and model.safetensors that timm.create_model reads through its hub ("local-dir:" or "hf-hub:")."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path

from ssmzoo.inference.export.source import Source, save_tensors

COLOUR = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
GREY = dict(mean=[0.5], std=[0.5])  # what the zoo's data normalises grey images with


def refuse(source: Source) -> str | None:
    if source.kind != "image":
        return "timm holds image models"
    if source.node is None:
        return "only a run records the constructor's arguments; timm reads a released file by pretrained_cfg_overlay"
    if importlib.util.find_spec("timm") is None:
        return "timm is not installed (pip install timm)"
    if architecture(source) is None:
        return f"no size of {source.cls.__name__} is registered with timm"
    return None


def architecture(source: Source) -> str | None:
    """The registered name of this model, or of another size of its class."""
    import ssmzoo.timm as registered

    names = [n for n in registered.default_cfgs if registered.arguments_of(n)[0] is source.cls]
    return source.name if source.name in names else next(iter(sorted(names, key=len)), None)


def write(source: Source, folder: Path) -> None:
    import timm

    name, arguments = architecture(source), every_argument(source)
    model = timm.create_model(name, **arguments)
    channels = arguments.get("in_chans", 3)
    side = source.manifest.get("data", {}).get("image_size") or arguments.get("img_size") or 224
    sides = (side, side) if isinstance(side, int) else tuple(side)
    pretrained = {k: v for k, v in model.pretrained_cfg.items() if v not in (None, "", ())} | {
        **(GREY if channels == 1 else COLOUR),
        "input_size": [channels, *sides],
        "num_classes": model.num_classes,
    }
    for key in ("pool_size", "label_names"):
        pretrained.pop(key, None)
    config = {
        "architecture": name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tensors(source.model.state_dict(), folder / "model.safetensors")


def every_argument(source: Source) -> dict:
    """The constructor's arguments, left out ones with their defaults: the registered size may have others."""
    parameters = inspect.signature(source.cls).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | {key: value for key, value in source.node.items() if key != "_target_"}


def usage(source: Source) -> str:
    return (
        "```python\nimport timm, ssmzoo.timm\n"
        'model = timm.create_model("local-dir:this/folder", pretrained=True)\n```\n'
        "From a repository of the hub: `hf-hub:owner/name`."
    )
