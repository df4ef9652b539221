"""Segmentation and detection as a user runs them: train.py, eval.py and `ssmzoo predict`, two steps each."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssmzoo.inference.segment import class_scores, slide, windows
from ssmzoo.train.config import paired_overrides

SHORT = [
    *("trainer.accelerator=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1"),
    *("data.num_workers=0", "data.batch_size=2", "name=a"),
]
EMBEDDED = ["data.val_scenes=2", "data.train_scenes=8"]


def coco_layout(root, side="train2017", count=4):
    """Bright rectangles of two kinds on grey noise."""
    rng = np.random.default_rng(len(side))
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tall"}, {"id": 2, "name": "wide"}]}
    (root / side).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for i in range(count):
        levels = rng.integers(60, 120, (48, 64, 3)).astype(np.uint8)
        w, h = (12, 24) if i % 2 else (28, 10)
        x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 48 - h))
        levels[y : y + h, x : x + w] = 240
        Image.fromarray(levels).save(root / side / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 48})
        corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        content["annotations"].append(
            {"id": i, "image_id": i, "bbox": [x, y, w, h], "category_id": 2 - i % 2, "area": w * h, "iscrowd": 0}
            | {"segmentation": corners}
        )
    (root / f"annotations/instances_{side}.json").write_text(json.dumps(content))
    return root


def test_task_and_data_choose_each_other():
    assert "data=digit_scenes" in paired_overrides(["model=vmamba", "task=segmentation"])
    assert "data=digit_objects" in paired_overrides(["model=vmamba", "task=detection"])
    assert "task=detection" in paired_overrides(["model=vmamba", "data=coco"])
    assert paired_overrides(["task=segmentation", "data=ade20k"]) == ["task=segmentation", "data=ade20k"]
    assert paired_overrides(["task=segmentation", "experiment=x"]) == ["task=segmentation", "experiment=x"]


def test_a_segmentation_run_its_evaluation_and_its_masks(call, tmp_path):
    status, out, error = call("model=vmamba", "task=segmentation", *SHORT, *EMBEDDED)
    assert status == 0, error
    run = tmp_path / "runs/vmamba/a"
    assert (run / "overlays.png").stat().st_size > 5000 and "validation mIoU" in out
    assert "linear classifier on 5x5 pixels, mIoU" in (run / "report.md").read_text()
    status, evaluated, error = call(
        "ckpt=runs/vmamba/a", "task.slide=[32,16]", "task.flip=true", "task.scales=[1.0,0.5]", entry="eval"
    )
    assert status == 0, error
    assert "windows [32, 16], scales [1.0, 0.5], flip True" in evaluated
    rows = list(csv.DictReader((run / "eval/classes.csv").open()))
    assert [r["class"] for r in rows] == ["background", *"0123456789"] and sum(
        int(r["pixels"]) for r in rows
    ) == 2 * 64**2

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3)).astype(np.uint8)).save("mine.png")
    status, out, error = call(
        "predict", "runs/vmamba/a", "mine.png", "--draw", "drawn", "--out", "t.json", entry="ssmzoo"
    )
    assert status == 0 and "mine.png: " in out and "-> drawn/mine.png" in out, error
    ids = np.asarray(Image.open("drawn/mine_mask.png"))
    assert ids.shape == (50, 80) and ids.max() <= 10 and Image.open("drawn/mine.png").size == (80, 50)
    found = json.loads((tmp_path / "t.json").read_text())[0]["found"]
    assert sum(share for _, share, _ in found) == pytest.approx(1.0)
    status, _, error = call("predict", "runs/vmamba/a", "mine.png", "--sheet", "s.png", entry="ssmzoo")
    assert status == 2 and "--sheet is for classes of pictures" in error


def test_a_detection_run_on_a_folder_of_coco_and_its_boxes(call, tmp_path):
    coco_layout(tmp_path / "mine")
    coco_layout(tmp_path / "mine", "val2017", 2)
    arguments = ["task.min_size=64", f"data.path={tmp_path / 'mine'}"]
    status, out, error = call("model=spatial_mamba", "data=coco", *arguments, *SHORT)
    assert status == 0, error
    run = tmp_path / "runs/spatial_mamba/a"
    assert "validation box AP" in out and "blob detector with a linear classifier" in (run / "report.md").read_text()
    assert (run / "overlays.png").exists() and "AP per class" in out
    status, _, error = call("ckpt=runs/spatial_mamba/a", entry="eval")
    assert status == 0, error
    picture = str(tmp_path / "mine/val2017/0.png")
    status, out, error = call(
        "predict", "runs/spatial_mamba/a", picture, "--min-score", "0", "--out", "t.csv", entry="ssmzoo"
    )
    assert status == 0 and "-> predictions/0.png" in out, error
    assert (tmp_path / "t.csv").read_text().startswith("file,class,share_or_score,x0,y0,x1,y1")
    assert Image.open("predictions/0.png").size[0] == 400


def test_a_run_goes_on_and_starts_from_a_classifier(call, tmp_path):
    status, _, error = call("model=vmamba", *SHORT, "name=c", "trainer.limit_val_batches=1")
    assert status == 0, error
    arguments = ["task=segmentation", *SHORT, *EMBEDDED, "init_from=runs/vmamba/c"]
    status, out, error = call("model=vmamba", *arguments)
    assert status == 0 and "starting from runs/vmamba/c" in out, error
    status, _, error = call("resume=runs/vmamba/a", "trainer.max_steps=3")
    assert status == 0, error
    status, _, error = call("resume=runs/vmamba/a", "trainer.max_steps=4", "task.channels=8")
    assert status == 2 and "task.channels" in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model=mamba", "task=segmentation"], ["MambaLM has no feature maps", "vmamba"]),
        (["model=mambair", "task=detection"], ["MambaIR has no feature maps"]),
        (["model=vmamba", "task=segmentation", "task.head=upernett"], ["nearest: upernet"]),
        (["model=vmamba", "task=segmentation", "task.slide=[16,32]"], ["no larger than the crop"]),
        (["model=vmamba", "task=segmentation", "task.scales=[0.0]"], ["task.scales"]),
        (["model=vmamba", "task=segmentation", "data=digits"], ["needs a class for every pixel"]),
        (["model=vmamba", "task=detection", "data=digit_scenes"], ["needs objects with boxes"]),
    ],
)
def test_what_cannot_work_is_one_message(arguments, words, call, tmp_path):
    status, _, error = call(*arguments)
    assert status == 2 and error.count("\n") == 1, error
    for word in words:
        assert word in error


class Constant:
    """A segmenter whose logits are the mean colour of what it sees, which tells windows apart."""

    def segment(self, x):
        return x.mean((2, 3), keepdim=True).expand_as(x)


def test_windows_cover_everything_once_or_more():
    assert windows(10, 4, 3) == [0, 3, 6] and windows(11, 4, 3) == [0, 3, 6, 7] and windows(3, 4, 3) == [0]
    x = torch.randn(1, 2, 11, 7)
    found, total, seen = slide(Constant().segment, x, 4, 3), torch.zeros(1, 2, 11, 7), torch.zeros(11, 7)
    for top in windows(11, 4, 3):
        for left in windows(7, 4, 3):
            total[:, :, top : top + 4, left : left + 4] += x[:, :, top : top + 4, left : left + 4].mean((2, 3), True)
            seen[top : top + 4, left : left + 4] += 1
    assert torch.allclose(found, total / seen, atol=1e-6)


def test_scales_and_mirror_images_are_averaged_as_probabilities():
    class Pixels:
        def segment(self, x):
            return torch.stack([x[:, 0], x[:, 1] * torch.arange(x.shape[3])], 1)  # sees where left and right are

    x = torch.randn(1, 2, 6, 8)
    found = class_scores(Pixels(), x, flip=True)
    plain, mirrored = Pixels().segment(x).softmax(1), Pixels().segment(x.flip(3)).softmax(1).flip(3)
    assert torch.allclose(found, (plain + mirrored) / 2, atol=1e-6)
    assert torch.allclose(class_scores(Pixels(), x, scales=[1.0, 1.0]), plain, atol=1e-6)
    assert class_scores(Pixels(), x, (12, 16), scales=[0.5, 2.0]).shape == (1, 2, 12, 16)
