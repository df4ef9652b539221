"""mIoU and COCO's average precision: known answers, and pycocotools where it is installed."""

import importlib.util

import pytest
import torch

from ssmzoo.tasks.metrics.detection import average_precision, by_pycocotools, coco_backend, own_precision
from ssmzoo.tasks.metrics.segmentation import class_iou, confusion, scores


def test_iou_of_a_known_confusion():
    truth = torch.tensor([[0, 0, 1, 1], [2, 2, -1, -1]])
    predicted = torch.tensor([[0, 1, 1, 1], [2, 0, 0, 2]])
    table = confusion(predicted, truth, 4)
    assert table.sum() == 6 and table[0, 1] == 1 and table[2, 0] == 1
    iou = class_iou(table)
    assert iou[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2]) and iou[3].isnan()  # the last never occurs
    found = scores(table)
    assert found["miou"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 2) / 3)
    assert found["pixel_accuracy"] == pytest.approx(4 / 6)
    assert found["mean_accuracy"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)


def box_objects(boxes, labels, scores=None, size=64, crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist()):
        mask[y0:y1, x0:x1] = True
    found = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "masks": masks}
    if scores is None:
        return found | {"crowd": torch.tensor(crowd or [False] * len(boxes), dtype=torch.bool)}
    return found | {"scores": torch.tensor(scores)}


def test_average_precision_of_known_cases():
    truth = [box_objects([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 0])]
    one = [box_objects([[0, 0, 10, 10]], [0], [0.9])]
    assert own_precision(one, truth, "bbox")["map"] == pytest.approx(51 / 101)  # recalls 0 to 0.50 of 101
    wrong_first = [box_objects([[50, 50, 60, 60], [0, 0, 10, 10]], [0, 0], [0.9, 0.8])]
    assert own_precision(wrong_first, truth, "bbox")["map"] == pytest.approx(0.5 * 51 / 101)
    shifted = [box_objects([[0, 0, 10, 7]], [0], [0.9])]  # overlaps by 0.7: five thresholds of ten
    assert own_precision(shifted, truth, "bbox")["map"] == pytest.approx(51 / 101 * 5 / 10)
    found = own_precision([box_objects([], [], [])], truth, "bbox")
    assert found["map"] == 0 and found["map_large"] != found["map_large"]  # no large object: NaN
    crowd = [box_objects([[0, 0, 10, 10], [20, 20, 60, 60]], [0, 0], crowd=[False, True])]
    inside = [box_objects([[0, 0, 10, 10], [25, 25, 35, 35], [40, 40, 50, 50]], [0, 0, 0], [0.5, 0.9, 0.8])]
    assert own_precision(inside, crowd, "bbox")["map"] == pytest.approx(
        1.0
    )  # a crowd takes any number, which count not


def random_case(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high, n):
        return torch.randint(low, high, (n,), generator=generator).tolist()

    found, truth = [], []
    for _ in range(6):
        n = number(0, 6, 1)[0]
        corners = [number(0, 60, n), number(0, 60, n), number(4, 60, n), number(4, 60, n)]
        boxes = [[x, y, min(128, x + w), min(128, y + h)] for x, y, w, h in zip(*corners)]
        labels = number(0, 3, n)
        truth.append(box_objects(boxes, labels, size=128, crowd=[v == 0 for v in number(0, 8, n)]))
        moved = [[max(0, v + d) for v, d in zip(b, number(-3, 4, 4))] for b in boxes] + [[1, 1, 30, 30]] * 2
        moved = [[x, y, max(x + 1, x1), max(y + 1, y1)] for x, y, x1, y1 in moved]
        scores = torch.rand(len(moved), generator=generator).tolist()
        found.append(box_objects(moved, [*labels, *number(0, 3, 2)], scores, size=128))
    return found, truth


@pytest.mark.skipif(coco_backend() == "own", reason="pycocotools is not installed")
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_ours_agrees_with_the_installed_library(kind):
    for seed in range(8):
        found, truth = random_case(seed)
        ours, theirs = own_precision(found, truth, kind), by_pycocotools(found, truth, kind)
        for key in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-6, nan_ok=True), (seed, key)
        for label, value in theirs["per_class"].items():
            assert ours["per_class"][label] == pytest.approx(value, abs=1e-6, nan_ok=True)


def test_the_choice_of_a_backend():
    found, truth = random_case(0)
    assert average_precision(found, truth, backend="own")["map"] == own_precision(found, truth, "bbox")["map"]
    assert coco_backend() == ("pycocotools" if importlib.util.find_spec("pycocotools") else "own")
    assert average_precision(found, truth)["map"] == pytest.approx(own_precision(found, truth, "bbox")["map"])
