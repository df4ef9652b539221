"""What finds objects without learning where: blobs of scikit-image, named by a linear classifier of their pixels."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.tasks.metrics.detection import average_precision

SIDE = 8  # pixels that a box is reduced to for the classifier
ANSWERED = 30  # blobs per picture


def patch(image: Tensor, box: np.ndarray) -> np.ndarray:
    """(3 y x) -> (3*SIDE*SIDE) levels of the box, resized"""
    height, width = image.shape[1:]
    x0, y0 = (int(np.clip(v, 0, side - 1)) for v, side in zip(box[:2], (width, height)))
    x1, y1 = (int(np.clip(np.ceil(v), a + 1, side)) for v, a, side in zip(box[2:], (x0, y0), (width, height)))
    return F.interpolate(image[None, :, y0:y1, x0:x1], (SIDE, SIDE), mode="bilinear").flatten().numpy()


def blobs(image: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (n 4) around differences of Gaussians, light or dark, and their strengths (n)."""
    from skimage.feature import blob_dog

    grey = image.mean(0).numpy()
    largest = max(2.0, min(grey.shape) / 4)
    found = [
        np.c_[b, np.full(len(b), i)] for i, g in enumerate((grey, 1 - grey)) if len(b := dog(blob_dog, g, largest))
    ]
    if not found:
        return np.zeros((0, 4)), np.zeros(0)
    y, x, sigma = np.concatenate(found).T[:3]
    reach = sigma * 2**0.5
    boxes = np.stack([x - reach, y - reach, x + reach, y + reach], 1)
    boxes = boxes.clip(0, [grey.shape[1], grey.shape[0]] * 2)
    inside = np.array(
        [abs(grey[int(b[1]) : int(b[3]) + 1, int(b[0]) : int(b[2]) + 1].mean() - grey.mean()) for b in boxes]
    )
    order = np.argsort(-inside)[:ANSWERED]
    return boxes[order], inside[order]


def dog(blob_dog, grey: np.ndarray, largest: float) -> np.ndarray:
    return blob_dog(grey, min_sigma=2, max_sigma=largest, threshold=0.05)


def blob_detector(data, pictures: int = 200) -> dict | None:
    """COCO's box AP on validation pictures; None without scikit-image or scikit-learn.

    A blob's class and score are those of a logistic regression on the pixels of its box, trained on true boxes and on
    blobs that are none (overlap below a half with every true box).
    """
    try:
        import skimage.feature  # noqa: F401
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        return None
    from torchvision.ops.boxes import box_iou

    x, y, nothing = [], [], len(data.classes)
    for image, target in some(data.train_dataloader(), pictures):
        x += [patch(image, b) for b in target["boxes"].numpy()]
        y += target["labels"].tolist()
        found, _ = blobs(image)
        overlap = box_iou(torch.from_numpy(found).float(), target["boxes"].float())
        wrong = found[(overlap.amax(1) if overlap.shape[1] else overlap.new_zeros(len(found))).numpy() < 0.5]
        x += [patch(image, b) for b in wrong[:5]]
        y += [nothing] * len(wrong[:5])
    if len(set(y)) < 2:
        return None
    named = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.01))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that end before the last digit
        named.fit(np.stack(x), y)
    answers, truth = [], []
    for image, target in some(data.val_dataloader(), pictures):
        boxes, _ = blobs(image)
        share = named.predict_proba(np.stack([patch(image, b) for b in boxes])) if len(boxes) else np.zeros((0, 1))
        share = share[:, named.classes_ != nothing] if len(boxes) else share
        best = share.argmax(1) if len(boxes) else np.zeros(0, dtype=int)
        labels = named.classes_[named.classes_ != nothing][best]
        scores = share[np.arange(len(boxes)), best]
        given = {"boxes": boxes, "labels": labels.astype(np.int64), "scores": scores}
        answers.append({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in given.items()})
        truth.append(target | {"masks": target["masks"].bool()})
    return average_precision(answers, truth, "bbox")


def some(loader, pictures: int):
    """The first pictures and their targets."""
    for count, pair in enumerate(pair for batch in loader for pair in zip(batch["image"], batch["target"])):
        if count == pictures:
            return
        yield pair
