"""COCO's average precision: by pycocotools where it is installed, otherwise by our own code.

For every class, area range and overlap threshold: detections in falling order of score take the best free object that
they overlap by the threshold; precision is made monotone and read off at 101 recalls; AP is its mean. `map` averages
over the thresholds .50 .55 ... .95 and the classes that occur, with at most 100 detections per picture.

The own one follows the definition of COCO's evaluation and agrees with pycocotools to rounding (tests).
torchmetrics is not used: its recalls have single precision, which moves AP in the third digit on small sets.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
RANGES = {"": (0.0, 1e10), "_small": (0.0, 32.0**2), "_medium": (32.0**2, 96.0**2), "_large": (96.0**2, 1e10)}


def coco_backend() -> str:
    """Who computes: pycocotools, or "own"."""
    return "pycocotools" if importlib.util.find_spec("pycocotools") else "own"


def average_precision(found: list[dict], truth: list[dict], kind: str = "bbox", backend: str | None = None) -> dict:
    """{"map", "map_50", "map_75", "map_small", "map_medium", "map_large", "per_class": {label: AP}}; NaN: none.

    found   per picture {"boxes" (n 4), "labels" (n), "scores" (n), "masks" (n y x) bool}
    truth   per picture {"boxes", "labels", "masks", "crowd" (n) bool};  kind  "bbox" or "segm"
    """
    backend = backend or coco_backend()
    return own_precision(found, truth, kind) if backend == "own" else by_pycocotools(found, truth, kind)


def by_pycocotools(found: list[dict], truth: list[dict], kind: str) -> dict:
    """See `average_precision`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    labels = sorted({c for d in (*found, *truth) for c in d["labels"].tolist()})
    objects, answers = ([o for i, d in enumerate(side, 1) for o in _records(d, i, kind)] for side in (truth, found))
    if not objects or not answers:
        return own_precision(found, truth, kind)
    pictures = [{"id": i, "height": 0, "width": 0} for i in range(1, len(truth) + 1)]
    known = {"images": pictures, "categories": [{"id": c} for c in labels]}
    with contextlib.redirect_stdout(io.StringIO()):
        sides = [COCO(), COCO()]
        for side, content in zip(sides, (objects, answers)):
            side.dataset = known | {"annotations": [o | {"id": n} for n, o in enumerate(content, 1)]}
            side.createIndex()
        evaluation = COCOeval(*sides, kind)
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (10 thresholds, 101 recalls, classes, 4 areas)

    def mean(values) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else float("nan")

    named = {"map": mean(precision[..., 0]), "map_50": mean(precision[0, ..., 0]), "map_75": mean(precision[5, ..., 0])}
    named |= {f"map{name}": mean(precision[..., i]) for i, name in enumerate(RANGES) if name}
    return named | {"per_class": {c: mean(precision[:, :, i, 0]) for i, c in enumerate(labels)}}


def _records(objects: dict, picture: int, kind: str) -> list[dict]:
    """Annotations of COCO's form."""
    from pycocotools import mask as encoder

    sides = torch.cat([objects["boxes"][:, :2], objects["boxes"][:, 2:] - objects["boxes"][:, :2]], 1).tolist()
    truth = "crowd" in objects
    size = areas(objects, "segm" if truth else kind).tolist()
    records = []
    for i, box in enumerate(sides):
        record = {"image_id": picture, "category_id": int(objects["labels"][i]), "bbox": box, "area": size[i]}
        record |= {"iscrowd": int(objects["crowd"][i])} if truth else {"score": float(objects["scores"][i])}
        if kind == "segm":
            record["segmentation"] = encoder.encode(np.asfortranarray(objects["masks"][i].numpy().astype(np.uint8)))
        records.append(record)
    return records


def areas(objects: dict, kind: str = "segm") -> Tensor:
    """(n) pixels of the masks, or of the boxes where there are none."""
    if kind == "segm" and "masks" in objects and len(objects["masks"]):
        return objects["masks"].flatten(1).sum(1).double()
    sides = objects["boxes"][:, 2:] - objects["boxes"][:, :2]
    return sides.prod(1).double()


def overlaps(found: dict, truth: dict, kind: str) -> np.ndarray:
    """(n m) intersection over union; over the detection's own area where the object is a crowd."""
    if kind == "bbox":
        a, b = found["boxes"].double(), truth["boxes"].double()
        sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
        inter = sides.prod(-1)
    else:
        a, b = (d["masks"].flatten(1).double() for d in (found, truth))
        inter = a @ b.T
    own, theirs = areas(found, kind)[:, None], areas(truth, kind)[None]
    return (inter / torch.where(truth["crowd"][None], own, own + theirs - inter).clamp(min=1e-9)).numpy()


def own_precision(found: list[dict], truth: list[dict], kind: str) -> dict:
    """See `average_precision`."""
    by_class: dict[int, list] = defaultdict(list)
    for f, t in zip(found, truth):
        for label in {*f["labels"].tolist(), *t["labels"].tolist()}:
            by_class[label].append((_of(f, label), _of(t, label)))
    tables = {
        c: {name: class_precision(pairs, area, kind) for name, area in RANGES.items()} for c, pairs in by_class.items()
    }

    def mean(name: str, part=slice(None)) -> float:
        values = [t[name][part].mean() for t in tables.values() if t[name] is not None]
        return float(np.mean(values)) if values else float("nan")

    named = {"map": mean(""), "map_50": mean("", slice(0, 1)), "map_75": mean("", slice(5, 6))}
    named |= {f"map{name}": mean(name) for name in RANGES if name}
    known = {c: float(t[""].mean()) if t[""] is not None else float("nan") for c, t in sorted(tables.items())}
    return named | {"per_class": known}


def _of(objects: dict, label: int) -> dict:
    return {k: v[objects["labels"] == label] for k, v in objects.items()}


def class_precision(pairs: list[tuple[dict, dict]], area: tuple[float, float], kind: str, most: int = 100):
    """(10) average precision per threshold for one class and area range; None where no object counts."""
    scores, hits, ignored, positives = [], [], [], 0
    for f, t in pairs:
        order = f["scores"].argsort(descending=True, stable=True)[:most]
        f = {k: v[order] for k, v in f.items()}
        size, own = areas(t).numpy(), areas(f, kind).numpy()
        aside = t["crowd"].numpy() | (size < area[0]) | (size > area[1])
        positives += int((~aside).sum())
        hit, out = matches(overlaps(f, t, kind), aside, t["crowd"].numpy())
        out |= ~hit & ((own < area[0]) | (own > area[1]))[None] & ~out
        scores.append(f["scores"].numpy())
        hits.append(hit)
        ignored.append(out)
    if not positives:
        return None
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits, ignored = np.concatenate(hits, 1)[:, order], np.concatenate(ignored, 1)[:, order]
    return np.array([curve_mean(h[~i], positives) for h, i in zip(hits, ignored)])


def matches(iou: np.ndarray, aside: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(10 n) whether a detection, in falling order of score, took an object, and whether it took one that is aside."""
    hit = np.zeros((len(THRESHOLDS), len(iou)), dtype=bool)
    out = np.zeros_like(hit)
    if not iou.size:
        return hit, out
    for i, threshold in enumerate(THRESHOLDS):
        free = np.ones(iou.shape[1], dtype=bool)
        for d, row in enumerate(iou):
            open_ = (free | crowd) & (row >= min(threshold, 1 - 1e-10))
            best = [c for c in (open_ & ~aside, open_ & aside) if c.any()]
            if best:
                taken = int(np.flatnonzero(best[0])[::-1][np.argmax(row[best[0]][::-1])])  # the last of equals
                free[taken] = False
                hit[i, d], out[i, d] = True, aside[taken]
    return hit, out


def curve_mean(hit: np.ndarray, positives: int) -> float:
    """Mean of the monotone precision at 101 recalls."""
    recall, precision = np.cumsum(hit) / positives, np.cumsum(hit) / np.maximum(np.arange(1, len(hit) + 1), 1e-9)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.where(at < len(recall), np.append(precision, 0.0)[np.minimum(at, len(recall))], 0.0).mean())
