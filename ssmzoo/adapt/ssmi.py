"""SSMI's memories (arXiv 2412.09875) into a frozen model, and files that hold them alone.

    from ssmzoo.adapt.ssmi import add_ssmi, load_adapter, save_adapter

    adapted = add_ssmi(model, visual_dim=768)             # a model of Hugging Face's, or a decoder of this zoo
    logits, state, _ = adapted(ids, visual=embeddings)    # the first call reads the pictures
    logits, state, _ = adapted(next_ids, state)
    save_adapter(adapted, "adapter")                      # memories, and the fingerprint of the model they belong to
    adapted = load_adapter(same_model, "adapter")

What is trained is `adapted.memories`; the model is frozen in place and stays in evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ssmzoo.models.ssmi import SSMI

WEIGHTS, CARD, FORMAT = "adapter.safetensors", "adapter.json", 1


def add_ssmi(
    model: nn.Module,
    visual_dim: int,
    layers: str | Sequence[int] = "all",
    share: bool = False,
    rank: int = 64,
    d_state: int = 16,
    expand: float = 1,
    inject: str = "prefix",
    selective: bool = True,
    gamma: str = "scalar",
    max_share: float = 1.0,
) -> SSMI:
    """Memories between attention and feed-forward of a model, which is frozen and changed in place.

    visual_dim   width of the visual embeddings (b m w)
    layers       all | every_k | last_k | numbers of layers;  share  one memory for all of them
    rank, d_state, expand, inject, selective, gamma   see `ssmzoo.models.ssmi.Memory`
    max_share    largest share of trained parameters

    Raises ValueError for a model whose layers are not known, for bad arguments, and above max_share; the model is
    then as it was.
    """
    memory = dict(rank=rank, d_state=d_state, expand=expand, inject=inject, selective=selective, gamma=gamma)
    return SSMI(model, visual_dim, layers, share, max_share, **memory)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def save_adapter(adapted: SSMI, folder: str | Path) -> Path:
    """Write the memories, their options and the fingerprint of their model; the whole folder appears, or nothing.

    Raises FileExistsError when the folder is there already.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; an adapter is never written over")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        state = {k: v.detach().cpu().contiguous() for k, v in adapted.memories.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        backbone = {"class": type(adapted.backbone).__name__, "fingerprint": fingerprint(adapted.backbone)}
        card = {"format": FORMAT, "visual_dim": adapted.visual_dim, "options": adapted.options, "backbone": backbone}
        (temporary / CARD).write_text(json.dumps(card, indent=1, default=list), encoding="utf-8")
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_adapter(model: nn.Module, folder: str | Path) -> SSMI:
    """The model with the memories of `save_adapter` in it. Raises ValueError for files that are damaged, and for
    memories that were trained in another model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        state = load_file(folder / WEIGHTS)
        backbone, options, visual_dim = card["backbone"], card["options"], card["visual_dim"]
        named = backbone["class"], backbone["fingerprint"]
        if card["format"] != FORMAT:
            raise ValueError(f"{folder / CARD} has format {card['format']!r}; this version reads {FORMAT}")
    except (OSError, json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no whole adapter ({CARD} and {WEIGHTS}): {error}") from None
    if fingerprint(model) != named[1]:
        raise ValueError(
            f"{folder} was trained in another model: a {named[0]} with fingerprint {named[1][:12]}; this "
            f"{type(model).__name__} has {fingerprint(model)[:12]}"
        )
    try:
        adapted = add_ssmi(model, visual_dim, **options)
        adapted.memories.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} does not fit its own options: {' '.join(str(error).split())}") from None
    return adapted
