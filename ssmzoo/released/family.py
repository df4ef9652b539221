"""Families by name: `ssmzoo/released/<family>.py`, or `ssmzoo/verify/<family>.py` for what is no released model."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re

from torch import Tensor, nn

from ssmzoo.suggest import nearest

HOMES = ("ssmzoo.verify", "ssmzoo.released")  # the first that has a family's file answers

FOREIGN = {  # systems of others, by a key of their files; the first that fits
    "RWKV": r"\.att\.(time_|x_r|r_k)",
    "Jamba": r"\.mamba\.dt_layernorm\.",
    "RecurrentGemma": r"temporal_block\.",
    "xLSTM": r"(^|\.)[ms]?xlstm",
    "S4": r"\.kernel\.(kernel\.)?(log_dt|C|inv_A_real|log_A_real)$",
    "SwinIR": r"residual_group\.blocks\.\d+\.attn\.",
    "a Swin Transformer": r"attn\.relative_position_bias_table",
    "a Llama or one of its relatives": r"self_attn\.[qkv]_proj\.weight",
    "GPT-2": r"h\.\d+\.attn\.c_attn\.weight",
    "GPT-NeoX": r"attention\.query_key_value\.weight",
    "BERT or one of its relatives": r"attention\.self\.query\.weight",
    "a vision Transformer": r"blocks\.\d+\.attn\.qkv\.weight",
    "ConvNeXt": r"stages\.\d+\.(blocks\.)?\d+\.(dwconv|conv_dw)\.weight",
    "a ResNet": r"layer1\.0\.conv1\.weight",
}


@functools.cache
def find(family: str, attribute: str):
    """An attribute of a family's file (`official`, `golden`, `from_official`, ...), imported now; None without one."""
    for home in HOMES:
        name = f"{home}.{family}"
        if family.isidentifier() and importlib.util.find_spec(name) is not None:
            found = getattr(importlib.import_module(name), attribute, None)
            if found is not None:
                return found
    return None


@functools.cache
def families(attribute: str) -> list[str]:
    """Names of the families whose files have an attribute."""
    names = {m.name for home in HOMES for m in pkgutil.iter_modules(importlib.import_module(home).__path__)}
    return sorted(name for name in names if find(name, attribute) is not None)


def telling_key(family: str, state: dict[str, Tensor]) -> str | None:
    """The first key that a checkpoint of this family has and others lack; each of its patterns must fit some key."""
    if any(telling_key(other, state) for other in find(family, "YIELDS_TO") or ()):
        return None
    patterns = find(family, "TELLING_KEYS")
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    keys = [next((key for key in state if re.search(pattern, key)), None) for pattern in patterns]
    return None if None in keys else keys[0]


def looks_like(state: dict[str, Tensor]) -> str:
    """'; by <key> it looks like ...' for an error message; empty when nothing is recognised."""
    for family in families("TELLING_KEYS"):
        if key := telling_key(family, state):
            return f"; by {key} it looks like a checkpoint of family {family!r}"
    return f"; {said}" if (said := foreign(state)) else ""


def foreign(state: dict[str, Tensor]) -> str:
    """'by <key> it looks like ...' for a checkpoint of no family here; empty for one that nobody knows."""
    for name, pattern in FOREIGN.items():
        if key := next((key for key in state if re.search(pattern, key)), None):
            return f"by {key} it looks like {name}, which the zoo does not have"
    return ""


def family_of(state: dict[str, Tensor]) -> str | None:
    """The family whose telling keys a state dict in official names has."""
    return next((family for family in families("TELLING_KEYS") if telling_key(family, state)), None)


def to_ours(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in our names or in those of any family that has this model's weights -> in our names."""
    if state.keys() <= model.state_dict().keys():  # ours already, perhaps not all of them
        return dict(state)
    for family in families("MODELS"):
        convert = find(family, "from_official")
        if convert is None or type(model) not in find(family, "MODELS"):
            continue
        if family_of(state) == family or find(family, "TELLING_KEYS") is None:
            return convert(model, state)
    return dict(state)


def to_official(family: str, module: nn.Module, state: dict[str, Tensor] | None = None, **official_kwargs):
    """The weights of a module of ours under the official names of `family`: what its official class loads.

    state            other tensors than the module's own, under its names
    official_kwargs  the official constructor's arguments, for what the names or tables there depend on them

    Raises ValueError for a family without official weights.
    """
    state = module.state_dict() if state is None else state
    if find(family, "official") is None:
        known = families("official")
        raise ValueError(f"unknown family {family!r}{nearest(family, known)}; known: {', '.join(known)}")
    convert = find(family, "to_official")
    if convert is None:
        return dict(state)  # our names are theirs
    wanted = inspect.signature(convert).parameters
    return convert(module, state, **{key: value for key, value in official_kwargs.items() if key in wanted})
