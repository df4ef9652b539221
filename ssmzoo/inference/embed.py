"""Features of pictures or texts: what the last layer before a model's head says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ssmzoo.inference.predict import read_batches
from ssmzoo.inference.subject import Subject

POOLS = ("mean", "last")


@torch.inference_mode()
def embed_pictures(
    subject: Subject, files: Iterable[Path], batch: int = 32, failed=None
) -> tuple[list[str], np.ndarray]:
    """(names, features (n d) float32) of picture files: pooled, as they go into the head."""
    if not hasattr(subject.model, "forward_head"):
        raise ValueError(f"{subject.name} holds a {type(subject.model).__name__}, which takes no pictures")
    device = next(subject.model.parameters()).device
    names, rows = [], []
    for found, images in read_batches(subject, files, batch, failed):
        features = subject.model.forward_features(images.to(device))
        rows.append(subject.model.forward_head(features, pre_logits=True).float().cpu())
        names += map(str, found)
    return names, torch.cat(rows).numpy() if rows else np.zeros((0, 0), np.float32)


def embed_texts(subject: Subject, texts: Iterable[str], pool: str = "mean") -> tuple[list[str], np.ndarray]:
    """(texts, features (n d) float32): hidden states before the head, their mean over the tokens or the last."""
    if subject.tokenizer is None:
        raise ValueError(f"{subject.name} holds {type(subject.model).__name__} without a tokenizer: no language model")
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}; choose one of {', '.join(POOLS)}")
    texts = list(texts)
    return texts, torch.stack([row.float().cpu() for row in _text_rows(subject, texts, pool)]).numpy()


@torch.inference_mode()
def _text_rows(subject: Subject, texts: list[str], pool: str) -> Iterator[Tensor]:
    device = next(subject.model.parameters()).device
    for text in texts:
        ids = subject.tokenizer.encode(text)
        if not len(ids):
            raise ValueError("a text is empty; give at least one character")
        hidden = before_head(subject.model, torch.tensor([list(ids)], device=device))[0]
        yield hidden.mean(0) if pool == "mean" else hidden[-1]


def before_head(model: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states (b l d) that a language model's head reads."""
    head, kept = getattr(model, "lm_head", None) or getattr(model, "head", None), []
    if head is None:
        raise ValueError(f"{type(model).__name__} has no head whose input could be taken")
    handle = head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    try:
        model(ids)
    finally:
        handle.remove()
    return kept[0]


def write_features(path: Path, names: list[str], features: np.ndarray) -> None:
    """As .npz (names, features) or .parquet (a column per feature). Raises ValueError for another suffix."""
    if path.suffix == ".npz":
        np.savez(path, names=np.array(names), features=features)
    elif path.suffix == ".parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise ValueError(f"{path}: .parquet needs pyarrow (pip install pyarrow); .npz needs nothing") from None
        columns = {"name": names} | {f"f{i}": features[:, i] for i in range(features.shape[1])}
        pq.write_table(pa.table(columns), path)
    else:
        raise ValueError(f"{path} must end in .npz or .parquet")
