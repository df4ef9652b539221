"""Dense data: the embedded scenes, folders of masks, COCO's layout, and what is wrong with a user's."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssmzoo.data.dense.coco import decoded, run_lengths
from ssmzoo.data.dense.masks import read_ids
from ssmzoo.data.dense.module import DetectionData, SegmentationData
from ssmzoo.data.dense.scene import IGNORED
from ssmzoo.tasks.metrics import segmentation


def test_both_sides_ignore_the_same_class():
    assert IGNORED == segmentation.IGNORED


def test_embedded_scenes_are_exact_and_repeatable():
    data = DetectionData(val_scenes=6)
    train, val = data.sides()
    for scene in (val.read(0, 1), val.read(3, 1), train.read(0, 77)):
        objects = scene.objects
        assert scene.image.shape == (64, 64, 3) and 1 <= len(objects) <= 4
        for box, label, mask in zip(objects.boxes, objects.labels, objects.masks):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert (scene.classes[mask > 0] == label + 1).all()
        assert (scene.classes > 0).sum() == objects.masks.sum()  # no two digits share a pixel
    assert np.array_equal(train.read(0, 5).image, train.read(9, 5).image)  # by seed alone
    assert np.array_equal(val.read(2, 5).image, val.read(2, 6).image)  # by index alone
    assert not np.array_equal(val.read(1, 0).image, val.read(2, 0).image)


def test_no_digit_and_no_photograph_is_on_both_sides():
    from ssmzoo.data.photos import EMBEDDED_TRAIN, EMBEDDED_VAL

    train, val = SegmentationData().sides()
    digits = [{levels.tobytes() for levels in side.read.args[1]} for side in (train, val)]
    assert not digits[0] & digits[1] and not set(EMBEDDED_TRAIN) & set(EMBEDDED_VAL)
    assert train.read.args[3] == EMBEDDED_TRAIN and val.read.args[3] == EMBEDDED_VAL


def test_batches_of_the_embedded_scenes():
    data = SegmentationData(batch_size=4, val_scenes=6)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 64, 64) and batch["classes"].shape == (4, 64, 64)
    assert data.classes == ["background", *"0123456789"] and data.sizes["num_classes"] == 11
    data = DetectionData(batch_size=4, val_scenes=6)
    batch = next(iter(data.train_dataloader()))
    assert len(batch["image"]) == 4 and batch["target"][0]["boxes"].shape[1] == 4 and data.sizes["num_classes"] == 10
    assert "crowd" in next(iter(data.val_dataloader()))["target"][0]


# Folders of masks


def picture(path, size=(40, 30), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)).save(path)


def mask(path, ids, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids if mode is None else ids.astype(np.uint8), mode=mode)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    image.save(path)


@pytest.fixture
def folder(tmp_path):
    """Eight pictures with masks of three classes, palette and 16-bit ids mixed."""
    for i in range(8):
        ids = np.random.default_rng(i).integers(0, 3, (30, 40))
        ids[0, 0] = 255 if i % 2 else 2
        picture(tmp_path / f"images/{i}.png", seed=i)
        if i % 2:
            mask(tmp_path / f"masks/{i}.png", ids, "P")
        else:
            mask(tmp_path / f"masks/{i}.png", ids.astype(np.uint16))
    return tmp_path


def test_ids_of_palettes_and_of_1_2_4_8_and_16_bits(tmp_path):
    ids = np.arange(12).reshape(3, 4) % 3
    mask(tmp_path / "p.png", ids, "P")
    mask(tmp_path / "l.png", ids.astype(np.uint8))
    mask(tmp_path / "deep.png", (ids * 300).astype(np.uint16))
    Image.fromarray(ids.astype(bool)).save(tmp_path / "bit.png")
    assert all(np.array_equal(read_ids(tmp_path / f"{n}.png"), ids) for n in "pl")
    assert np.array_equal(read_ids(tmp_path / "deep.png"), ids * 300)
    assert np.array_equal(read_ids(tmp_path / "bit.png"), ids > 0)
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)  # 4 bits of grey
    rows = zlib.compress(bytes([0, 0x01, 0x2F]))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "four.png").write_bytes(content)
    assert read_ids(tmp_path / "four.png").tolist() == [[0, 1, 2, 15]]


def test_a_folder_of_masks(folder):
    data = SegmentationData(str(folder), augment={"crop": 24, "scale": [0.5, 2.0], "hflip": 0.5}, batch_size=2)
    assert data.classes == ["0", "1", "2"] and len(data.sides()[0]) + len(data.sides()[1]) == 8
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 24, 24) and set(batch["classes"].unique().tolist()) <= {-1, 0, 1, 2}
    again = next(iter(SegmentationData(str(folder), augment=data.augment, batch_size=2).train_dataloader()))
    assert torch.equal(batch["image"], again["image"])  # crops follow from the seed
    whole = next(iter(data.val_dataloader()))
    assert whole["image"].shape == (1, 3, 30, 40) and whole["classes"].shape == (1, 30, 40)
    small = SegmentationData(str(folder), augment={"crop": 24}, val_size=15)
    batch = next(iter(small.val_dataloader()))
    assert batch["image"].shape == (1, 3, 15, 20) and batch["classes"].shape == (1, 30, 40)


def test_the_layout_of_ade20k(tmp_path):
    for side in ("training", "validation"):
        picture(tmp_path / f"images/{side}/a.jpg")
        mask(tmp_path / f"annotations/{side}/a.png", np.array([[0, 1], [150, 2]]).repeat(15, 0).repeat(20, 1), "L")
    data = SegmentationData(str(tmp_path), augment={"crop": 32}, batch_size=1)
    assert len(data.classes) == 150
    classes = next(iter(data.val_dataloader()))["classes"]
    assert set(classes.unique().tolist()) == {-1, 0, 149, 1}  # 0 is ignored, ids begin at 1


def test_names_of_classes(folder):
    (folder / "classes.txt").write_text("sky\nsea\nsand\n")
    assert SegmentationData(str(folder), augment={"crop": 8}).classes == ["sky", "sea", "sand"]
    with pytest.raises(ValueError, match="data.classes = 4, but the file of names .* has 3"):
        SegmentationData(str(folder), augment={"crop": 8}, classes=4).setup()


def test_a_mask_of_another_size_or_with_unknown_ids(folder):
    mask(folder / "masks/0.png", np.zeros((30, 41), dtype=np.uint8))
    train, val = SegmentationData(str(folder), augment={"crop": 8}).sides()
    with pytest.raises(ValueError, match="0.png has 41x30 pixels, its picture 0.png 40x30"):
        [side.read(i, 0) for side in (train, val) for i in range(len(side))]
    mask(folder / "masks/0.png", np.full((30, 40), 7, dtype=np.uint8))
    train, val = SegmentationData(str(folder), augment={"crop": 8}, classes=3).sides()
    with pytest.raises(ValueError, match="holds the ids 7, but there are 3 classes"):
        [side.read(i, 0) for side in (train, val) for i in range(len(side))]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: (f / "masks/3.png").unlink(), "1 of 8 pictures in .* have no mask"),
        (lambda f: Image.new("RGB", (40, 30)).save(f / "masks/3.png"), "a mask holds one id per pixel"),
        (lambda f: (f / "masks/3.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing"), "cannot be read as a mask"),
        (lambda f: (f / "masks").rename(f / "other"), "expected the folders images and masks"),
    ],
)
def test_folders_that_cannot_be_used(folder, spoil, words):
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        SegmentationData(str(folder), augment={"crop": 8}).setup()


def test_arguments_that_do_not_go_together(folder):
    for wrong, words in (
        (dict(layout="kitti"), "choose one of auto, digits, folder, coco"),
        (dict(path=str(folder)), "set data.augment.crop"),
        (dict(augment={"flip": 1}), "nearest: hflip"),
        (dict(image_size=8), "at least 32"),
        (dict(layout="coco"), "needs data.path"),
    ):
        with pytest.raises(ValueError, match=words):
            SegmentationData(**wrong)
    with pytest.raises(ValueError, match="does not exist"):
        DetectionData(str(folder / "nowhere")).setup()
    with pytest.raises(ValueError, match="detection needs COCO's annotations"):
        DetectionData(str(folder)).setup()


# COCO


def coco_folder(root, change=None, count=5, side="train2017"):
    """Pictures of 40 x 30 with two objects each: a rectangle as a polygon, another one as run lengths, and a crowd."""
    content = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]}
    for i in range(count):
        picture(root / side / f"{i}.png", seed=i)
        content["images"].append({"id": 10 + i, "file_name": f"{i}.png", "width": 40, "height": 30})
        polygon = [[4, 5, 14, 5, 14, 20, 4, 20]]
        flat = np.zeros((30, 40), dtype=np.uint8)
        flat[10:20, 20:35] = 1
        edges = np.flatnonzero(np.diff(np.r_[0, flat.T.ravel(), 0]))
        counts = np.diff(np.r_[0, edges, 1200]).tolist()
        for n, (box, category, shape, crowd) in enumerate(
            [
                ([4, 5, 10, 15], 3, polygon, 0),
                ([20, 10, 15, 10], 7, {"counts": counts, "size": [30, 40]}, 0),
                ([0, 0, 40, 4], 7, [[0, 0, 40, 0, 40, 4, 0, 4]], 1),
            ]
        ):
            content["annotations"].append(
                {"id": 100 * i + n, "image_id": 10 + i, "bbox": box, "category_id": category, "area": box[2] * box[3]}
                | {"segmentation": shape, "iscrowd": crowd}
            )
    if change:
        change(content)
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{side}.json").write_text(json.dumps(content))
    return str(root)


def test_objects_of_coco(tmp_path):
    coco_folder(tmp_path)
    coco_folder(tmp_path, side="val2017", count=2)
    train, val = DetectionData(str(tmp_path)).sides()
    assert (len(train), len(val)) == (5, 2) and train.classes == ["cat", "dog"]
    objects = train.read(0, 0).objects
    assert objects.boxes[:2].tolist() == [[4, 5, 14, 20], [20, 10, 35, 20]] and objects.labels.tolist() == [0, 1, 1]
    assert objects.masks[0].sum() == 150 and objects.masks[1].sum() == 150
    assert objects.masks[1][10:20, 20:35].all() and objects.crowd.tolist() == [False, False, True]
    data = DetectionData(str(tmp_path), augment={"hflip": 1.0}, batch_size=1)
    target = next(iter(data.train_dataloader()))["target"][0]
    assert target["boxes"].tolist() == [[26, 5, 36, 20], [5, 10, 20, 20]] and "crowd" not in target
    assert next(iter(data.val_dataloader()))["target"][0]["crowd"].tolist() == [False, False, True]
    segmentation_data = SegmentationData(str(tmp_path), augment={"crop": 24}, batch_size=1)
    classes = next(iter(segmentation_data.val_dataloader()))["classes"]
    assert segmentation_data.classes == ["background", "cat", "dog"] and set(classes.unique().tolist()) == {-1, 0, 1, 2}


def test_a_share_of_one_file_is_held_out(tmp_path):
    train, val = DetectionData(coco_folder(tmp_path)).sides()
    assert (len(train), len(val)) == (4, 1)
    names = {side.read(i, 0).name for side in (train, val) for i in range(len(side))}
    assert len(names) == 5


def test_compressed_run_lengths():
    """The example of the format: 6 1 40 4 5 4 5 4 21."""
    assert run_lengths("61X13mN000`0") == [6, 1, 40, 4, 5, 4, 5, 4, 21]
    assert decoded({"counts": [1, 2, 1], "size": [2, 2]}, 2, 2).tolist() == [[0, 1], [1, 0]]


def test_pycocotools_decodes_the_same(tmp_path):
    encoder = pytest.importorskip("pycocotools.mask")
    flat = np.asfortranarray(np.random.default_rng(0).integers(0, 2, (30, 40)).astype(np.uint8))
    text = encoder.encode(flat)["counts"].decode()
    assert np.array_equal(decoded({"counts": text, "size": [30, 40]}, 30, 40), flat)
    for seed in range(5):
        polygon = np.random.default_rng(seed).uniform(1, 29, 12).tolist()
        theirs = encoder.decode(encoder.merge(encoder.frPyObjects([polygon], 30, 40)))
        assert (decoded([polygon], 30, 40) != theirs).sum() <= 25  # pixels that an edge cuts, of 1200


def drop_objects(content):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 12]


def set_first(**values):
    return lambda content: content["annotations"][0].update(values)


@pytest.mark.parametrize(
    "change, words",
    [
        (set_first(bbox=[30, 5, 20, 10]), r"1 impossible boxes; annotation 0: the box .* leaves its picture of 40x30"),
        (set_first(bbox=[3, 5, 0, 10]), "has no area"),
        (set_first(category_id=9), r"category ids \[9\]"),
        (set_first(image_id=99), "belongs to image 99, which is not there"),
        (lambda c: c.pop("categories"), "it lacks categories"),
        (lambda c: c.update(annotations=[]), "has an object; there is nothing to learn from"),
        (lambda c: c["images"][0].update(file_name="other.png"), "the picture other.png is in none of"),
        (lambda c: c["images"][0].update(file_name="../secret.png"), "the picture ../secret.png is in none of"),
    ],
)
def test_coco_files_that_contradict_themselves(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        DetectionData(coco_folder(tmp_path, change)).setup()


def test_a_segmentation_that_cannot_be_read(tmp_path):
    data = DetectionData(coco_folder(tmp_path, set_first(segmentation={"counts": [3], "size": [30, 40]})))
    with pytest.raises(ValueError, match="annotation 0 has no readable segmentation: run lengths of 3 pixels"):
        [side.read(i, 0) for side in data.sides() for i in range(len(side))]


def test_boxes_may_be_skipped_and_pictures_without_objects_are_said(tmp_path, capsys):
    coco_folder(tmp_path, lambda c: (drop_objects(c), set_first(bbox=[30, 5, 20, 10])(c)))
    coco_folder(tmp_path, side="val2017", count=2)
    train, _ = DetectionData(str(tmp_path), broken="skip").sides()
    said = capsys.readouterr().out
    assert "1 impossible boxes of instances_train2017.json were left out" in said
    assert "1 training pictures without objects are left out" in said and len(train) == 4
    assert len(DetectionData(str(tmp_path), broken="skip", keep_empty=True).sides()[0]) == 5


def test_a_class_that_never_occurs_is_said(tmp_path, capsys):
    coco_folder(tmp_path, lambda c: c["categories"].append({"id": 8, "name": "unicorn"}))
    DetectionData(str(tmp_path)).setup()
    assert "1 of 3 classes never occur in instances_train2017.json: unicorn" in capsys.readouterr().out
