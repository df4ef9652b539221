"""Released checkpoints into our modules, and the hooks by which a family says how.

A family is known by a function `official_<family>` in the file of the model, layer or operator it belongs to:

    def official_mamba(state, **official_kwargs) -> (module, our_state)

`state` maps official keys to tensors, `official_kwargs` are the official class's constructor arguments, `module` takes
the official inputs in order and returns the official outputs, and `our_state` is `state` under our names. The key map
must be made of differentiable tensor operations (rename, split, transpose, stack), so that gradients with respect to
the official tensors can be read off as well. Families are found by reading the sources: there is no list to edit.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message says which and what to do."""


@functools.cache
def hooks(prefix: str) -> dict[str, str]:
    """{family: module name} for every top-level function `<prefix>_<family>(state or case ...)` of the package."""
    root = Path(__file__).parent
    pattern = re.compile(rf"^def {prefix}_(\w+)\(\s*(?:state|case)\b", re.MULTILINE)
    found = {}
    for file in sorted(root.rglob("*.py")):
        for family in pattern.findall(file.read_text(encoding="utf-8")):
            found[family] = ".".join(("ssmzoo", *file.relative_to(root).with_suffix("").parts))
    return found


def find_hook(prefix: str, family: str):
    """The function `<prefix>_<family>`, imported now, or None."""
    module = hooks(prefix).get(family)
    return getattr(importlib.import_module(module), f"{prefix}_{family}") if module else None


def nearest(name: str, choices) -> str:
    """', nearest: a, b' for an error message; empty when nothing is close."""
    close = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth, .pt, .bin or .ckpt file, or of a folder that holds such files.

    Pickles are read with `weights_only=True`: no code from the file runs. Nested containers that training scripts use
    (`state_dict`, `model`, `model_state_dict`, `params_ema`, `params`) are opened. Raises CheckpointError.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}")
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(
            p for e in ("bin", "pth", "pt") for p in path.glob(f"*.{e}")
        )
        if not files:
            raise CheckpointError(f"{path} holds no .safetensors, .bin, .pth or .pt file")
        return {key: value for file in files for key, value in read_state_dict(file).items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        refuse_zip_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint (cut off or damaged?): {error}") from None
    except Exception as error:  # safetensors and pickle raise types of their own
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(f"{path} was refused: {type(error).__name__}: {reason}") from None
    for key in ("params_ema", "params", "state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} does not hold a plain mapping from names to tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def refuse_zip_bomb(path: Path) -> None:
    """torch stores tensors uncompressed; a file that unpacks to more than it weighs was not written by torch.save."""
    if not zipfile.is_zipfile(path):
        return  # cut off, or of a form older than zip: torch.load says which
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 1.2 * path.stat().st_size + (1 << 20):
        raise CheckpointError(f"{path} would unpack to {unpacked:,} bytes from {path.stat().st_size:,}: refused")


TELLING_KEYS = {  # family: a key, or part of one, that only its checkpoints have; the first that fits counts
    "mamba_fscil": r"etf_vec|block_new\.|mlp_proj\.",
    "mambair_v2": r"embeddingA|\.assm\.|\.win_mhsa\.",
    "mambair": r"layers\.\d+\.residual_group",
    "spatial_mamba": r"state_fusion\.|patch_embed\.conv1\.",
    "res_vmamba": r"(^|\.)fuse\.\d",
    "vmamba": r"(op|self_attention)\.x_proj_weight|classifier\.norm",
    "shuffle_mamba": r"pos_embed_cls|norm_neck",
    "vim": r"A_b_log",
    "adventurer": r"norm_mlp\.|mlp\.w3\.",
    "moe_mamba": r"router|expert",
    "mamba2": r"mixer\.dt_bias",
    "mamba": r"mixer\.x_proj\.weight",
}


def looks_like(state: dict[str, Tensor]) -> str:
    """'; by <key> it looks like ...' for an error message; empty when no family is recognised."""
    for family, pattern in TELLING_KEYS.items():
        key = next((k for k in state if re.search(pattern, k)), None)
        if key is not None:
            return f"; by {key} it looks like a checkpoint of family {family!r}"
    return ""


def load_official(family: str, checkpoint, **official_kwargs) -> nn.Module:
    """Build the official model of `family` from a checkpoint in the official naming, in eval mode.

    checkpoint       a path (.pth .pt .bin .safetensors, or a folder, whose config.json adds constructor arguments) or a
                     state dict
    official_kwargs  the official class's own constructor arguments
    returns          our module; its forward takes the official inputs in order and returns the official outputs

    Raises ValueError for an unknown family, TypeError for an unknown argument, CheckpointError for a checkpoint that
    is damaged or does not fit.
    """
    hook = find_hook("official", family)
    if hook is None:
        known = sorted(hooks("official"))
        raise ValueError(f"unknown family {family!r}{nearest(family, known)}; known: {', '.join(known)}")
    parameters = inspect.signature(hook).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in official_kwargs:
        if not open_ended and key not in parameters:
            raise TypeError(f"{family} takes no argument {key!r}{nearest(key, parameters)}")
    if isinstance(checkpoint, (str, Path)):
        config = Path(checkpoint) / "config.json"
        if config.is_file():
            from_file = json.loads(config.read_text())
            official_kwargs = {k: v for k, v in from_file.items() if open_ended or k in parameters} | official_kwargs
        checkpoint = read_state_dict(checkpoint)
    try:
        module, state = hook(dict(checkpoint), **official_kwargs)
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint has no {error}: is it one of family {family!r}?{looks_like(checkpoint)}"
        ) from None
    except (IndexError, RuntimeError) as error:  # a tensor of another shape than the key map expects
        raise CheckpointError(
            f"the checkpoint does not fit the official {family} model ({error}){looks_like(checkpoint)}"
        ) from error
    fit_state_dict(module, state, what=f"the official {family} model")
    return module.eval()


def fit_state_dict(module: nn.Module, state: dict[str, Tensor], what: str = "the model") -> None:
    """Load `state` strictly; raise CheckpointError listing missing and unexpected keys and wrong shapes."""
    own = module.state_dict()
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [
        f"{k}: {tuple(state[k].shape)} in the checkpoint, {tuple(v.shape)} in the model"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{name} {len(keys)}: {', '.join(keys[:6])}{' ...' if len(keys) > 6 else ''}"
        for name, keys in (("missing keys", missing), ("unexpected keys", extra), ("wrong shapes", wrong))
        if keys
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {what}; " + "; ".join(problems) + looks_like(state))
    module.load_state_dict(state)


class FunctionModule(nn.Module):
    """A parameterless function as a module, for families that are operators."""

    def __init__(self, function, **kwargs):
        super().__init__()
        self.function = functools.partial(function, **kwargs)

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)
