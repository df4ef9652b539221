"""`import ssmzoo.timm` registers the zoo's image models with timm:

>>> import timm, ssmzoo.timm
>>> model = timm.create_model("spatial_mamba_tiny", num_classes=10, in_chans=1)
>>> pyramid = timm.create_model("vmamba_tiny", features_only=True, out_indices=(1, 2, 3))

Every published size in configs/model whose class is an image backbone appears under its name; there is no list to edit
(the laptop sizes, which bring a task along, are left to `ssmzoo.create_model`).
pretrained=True fetches the released weights that `ssmzoo weights list` names; with
`pretrained_cfg_overlay=dict(file="released.pth")` it loads a file.
"""

from __future__ import annotations

import inspect
import re

from ssmzoo._torchvision import make_importable

make_importable()  # timm imports torchvision

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ssmzoo.layers.image.backbone import FourStage, ImageBackbone  # noqa: E402
from ssmzoo.presets import config_dir, list_models, model_class, read_model_config  # noqa: E402
from ssmzoo.released.catalogue import Asset, Hub, entries_of, find_weights  # noqa: E402
from ssmzoo.released.family import find, looks_like  # noqa: E402
from ssmzoo.released.files import WRAPPERS, CheckpointError, read_state_dict  # noqa: E402
from ssmzoo.suggest import nearest  # noqa: E402

IMAGENET = dict(
    num_classes=1000, crop_pct=0.875, interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
DEFAULT_SIZE = 224


def arguments_of(name: str) -> tuple[type[nn.Module], dict]:
    """Class and constructor arguments of a preset; what a data set would decide takes the constructor's default."""
    node = read_model_config(name)["model"]
    node = {k: v for k, v in node.items() if not (isinstance(v, str) and v.startswith("${"))}
    return model_class(node.pop("_target_")), node


def describe(name: str, cls: type[ImageBackbone], arguments: dict) -> dict:
    """timm's `default_cfg` of a preset, with what the catalogue says about its released weights."""
    cfg = IMAGENET | dict(input_size=(3, DEFAULT_SIZE, DEFAULT_SIZE), classifier=cls.classifier) | released(name)
    if issubclass(cls, FourStage):
        side = DEFAULT_SIZE
        for _ in range(len(arguments["depths"]) + 1):
            side = -(-side // 2)
        return cfg | dict(pool_size=(side, side), first_conv=cls.first_conv)
    return cfg | dict(pool_size=None, first_conv=cls.first_conv)


def released(name: str) -> dict:
    """Source, licence and preparation of pictures of the released weights; {} where none are known."""
    entry = next(iter(entries_of(name)), None)
    if entry is None:
        return {}
    cfg: dict = {"license": entry.licence, "notes": (entry.metric,) if entry.metric else ()}
    if isinstance(entry.source, Hub):
        cfg |= {"hf_hub_id": f"{entry.source.repo}@{entry.source.revision}", "hf_hub_filename": entry.source.file}
    elif isinstance(entry.source, Asset):
        cfg |= {"url": entry.source.url}
    if entry.picture:
        size, picture = entry.picture.size, entry.picture
        cfg |= {"input_size": (3, size, size), "crop_pct": picture.crop, "mean": picture.mean, "std": picture.std}
        cfg |= {"interpolation": picture.interpolation}
    return cfg


def default_indices(cls: type[ImageBackbone], arguments: dict) -> tuple[int, ...]:
    """Default out_indices: every stage, or the ends of four equal parts of a plain encoder (5, 11, 17, 23 of 24)."""
    if issubclass(cls, FourStage):
        return tuple(range(len(arguments["depths"])))
    depth = arguments["depth"]
    return tuple(sorted({depth * (i + 1) // 4 - 1 for i in range(4)} - {-1}))


def checkpoint_filter_fn(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A released (or our own) state dict under our names; positions are resized to the model's grid."""
    family = type(model).__module__.rpartition(".")[2]
    for key in find(family, "WRAPPERS") or WRAPPERS:  # of files that timm fetched; others are opened by `from_file`
        state = state.get(key, state)
    convert = find(family, "from_official")
    return convert(model, state) if convert else state


def plainly(name: str, error: RuntimeError, overlay: dict) -> CheckpointError:
    """torch's list of every key that does not fit, in a line, with what the file looks like."""
    said = []
    for kind, names in re.findall(r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)", str(error)):
        keys = re.findall(r'"([^"]+)"', names)
        said.append(f"{kind.lower()} keys {len(keys)}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}")
    if wrong := re.findall(r"size mismatch for ([^:]+):", str(error)):
        said.append(f"wrong shapes {len(wrong)}: {', '.join(wrong[:6])}{' ...' if len(wrong) > 6 else ''}")
    hint = looks_like(overlay.get("state_dict") or {})
    return CheckpointError(f"the checkpoint does not fit {name}; {'; '.join(said)}{hint}")


def from_file(cls: type[nn.Module], overlay: dict | None) -> dict | None:
    """A pretrained_cfg_overlay whose file is read here: by the family's choice of weights, and running nothing."""
    if not overlay or not overlay.get("file"):
        return overlay
    family = cls.__module__.rpartition(".")[2]
    state = read_state_dict(overlay["file"], find(family, "WRAPPERS") or WRAPPERS)
    return {key: value for key, value in overlay.items() if key != "file"} | {"state_dict": state}


def with_weights(name: str, cls: type[nn.Module], given: dict) -> dict:
    """Keyword arguments whose overlay holds tensors: of its file, or else the released ones of the preset."""
    overlay = given.get("pretrained_cfg_overlay") or {}
    if any(overlay.get(key) for key in ("file", "state_dict", "url", "hf_hub_id")) or given.get("pretrained_cfg"):
        return given | {"pretrained_cfg_overlay": from_file(cls, overlay)}
    from ssmzoo.released.download import fetch

    entry = find_weights(name)
    state = {"state_dict": read_state_dict(fetch(entry), entry.wrappers)}
    return dict(entry.model) | given | {"pretrained_cfg_overlay": dict(entry.model) | overlay | state}


def register(name: str) -> None:
    """Make timm know the preset `name`."""
    cls, arguments = arguments_of(name)

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        known = list(inspect.signature(cls).parameters)
        for key in kwargs:
            if key not in known and key not in BUILDER and key not in getattr(cls, "old_arguments", ()):
                raise TypeError(f"{name} takes no argument {key!r}{nearest(key, known)}; it takes {', '.join(known)}")
        if pretrained:
            kwargs = with_weights(name, cls, kwargs)
        features = dict(out_indices=default_indices(cls, arguments | kwargs), feature_cls="getter")
        more = {"pretrained_filter_fn": checkpoint_filter_fn, "feature_cfg": features} | arguments | kwargs
        try:
            return build_model_with_cfg(cls, name, pretrained, **more)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise plainly(name, error, kwargs.get("pretrained_cfg_overlay") or {}) from None

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"{cls.__name__} with the preset {name!r} of ssmzoo."
    globals()[name] = entrypoint
    default_cfgs.update(generate_default_cfgs({name: describe(name, cls, arguments)}))
    register_model(entrypoint)


BUILDER = (
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "features_only",
    "out_indices",
    "feature_cls",
    "cache_dir",
    "pretrained_model_args",
    "pretrained_strict",
    "output_fmt",
)  # read by timm's builder, not by our constructors
default_cfgs: dict = {}
__all__: list[str] = []

for _name in list_models(task="classification"):
    _home = "override /task" in (config_dir() / "model" / f"{_name}.yaml").read_text(encoding="utf-8")
    if not _home and issubclass(arguments_of(_name)[0], ImageBackbone):
        register(_name)
