"""Images as data: splits, folders with faults, sizes, reproducible augmentation; and the classifier's task on top."""

import numpy as np
import pytest
import torch
from PIL import Image

from ssmzoo.data.image_sources import stratified_split
from ssmzoo.data.images import ImageData, generators_kept, reseed
from ssmzoo.models.vmamba import VMamba
from ssmzoo.tasks.classification import ImageClassification, confusions, smooth_targets, soft_cross_entropy


def make_folder(root, classes=("cat", "dog"), count=4, mode="RGB"):
    generator = np.random.default_rng(0)
    for label in classes:
        (root / label).mkdir(parents=True)
        for i in range(count):
            shape = (9, 12, 3) if mode == "RGB" else (9, 12)
            Image.fromarray(generator.integers(0, 255, shape, dtype=np.uint8)).save(root / label / f"{i}.png")
    return root


def test_digits_are_split_by_seed_and_known_to_models():
    data = ImageData()
    assert data.sizes == {"in_chans": 1, "num_classes": 10, "img_size": 32}
    facts = data.describe()
    assert facts["train_images"] + facts["val_images"] == 1797 and facts["val_images"] == 359
    train, val = data._open()
    assert np.bincount(val.labels).min() >= 34
    assert ImageData().describe() == facts
    assert ImageData(split_seed=1)._open()[1].labels.tolist() != val.labels.tolist()
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (64, 1, 32, 32) and batch["label"].dtype == torch.int64
    assert batch["image"].min() == -1 and data.levels(batch["image"]).max() == 1


def test_augmentation_follows_from_seed_epoch_and_image():
    def first_batches(seed):
        loader = ImageData(augment={"scale": [0.5, 1.0]}, seed=seed).train_dataloader()
        return [next(iter(loader))["image"] for _ in range(2)]

    state = torch.get_rng_state()
    a, again = first_batches(0), first_batches(0)
    assert torch.equal(a[0], again[0]) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(a[0], first_batches(1)[0])
    with generators_kept():
        reseed(3)
        x = torch.rand(2)
        reseed(3)
        assert torch.equal(torch.rand(2), x)
    assert torch.equal(torch.get_rng_state(), state)


def test_repeated_augmentation_resumes_and_keeps_the_length_of_an_epoch():
    def loader(rank=0, world=1):
        data = ImageData(image_size=16, batch_size=30, repeats=3, augment={"scale": [0.5, 1.0]})
        made = data.train_dataloader()
        made.rank, made.world_size = rank, world
        return made

    whole = loader()
    batches = list(whole)
    assert len(batches) == 1438 // 30
    first = next(iter(loader()._epoch(0, 0)))
    assert len({d.index for d in first}) == 10 and len({d.seed for d in first}) == 30
    assert len({d.index for draws in loader()._epoch(0, 0) for d in draws}) == -(-1410 // 3)
    image = batches[0]["image"]
    assert torch.equal(batches[0]["label"][0::3], batches[0]["label"][2::3]) and not torch.equal(image[0], image[1])
    again = loader()
    again.load_state_dict({"epoch": 0, "position": 40})
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(again, batches[40:], strict=True))
    parts = [next(iter(loader(rank, 3)._epoch(0, 0))) for rank in range(3)]  # each rank has one of the three
    assert all(a.index == b.index and a.seed != b.seed for a, b in zip(parts[0], parts[2]))
    assert next(iter(loader(0, 3)._epoch(0, 1))) not in parts
    with pytest.raises(ValueError, match="repeats 0"):
        ImageData(repeats=0).train_dataloader()


def test_linear_baseline_is_that_of_the_digits():
    assert 0.93 < ImageData().linear_baseline() < 0.98


def test_stratified_split_takes_from_every_class():
    labels = np.array([0] * 10 + [1] * 3 + [2])
    train, val = stratified_split(labels, 0.2, 0)
    assert sorted([*train, *val]) == list(range(14)) and set(labels[val]) == {0, 1}
    assert set(labels[stratified_split(labels, 0.9, 0)[0]]) == {0, 1, 2}  # every class is trained on
    with pytest.raises(ValueError, match="val_fraction"):
        stratified_split(labels, 1.5, 0)


def test_folder_by_class_and_by_side(tmp_path):
    data = ImageData(path=str(make_folder(tmp_path / "a")), image_size=16, val_fraction=0.25, batch_size=2)
    assert data.sizes == {"in_chans": 3, "num_classes": 2, "img_size": 16} and data.classes == ["cat", "dog"]
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 16, 16)
    make_folder(tmp_path / "b" / "train")
    make_folder(tmp_path / "b" / "val", count=1)
    augment = {"three_augment": True, "hflip": 0.5}
    both = ImageData(path=str(tmp_path / "b"), image_size=16, augment=augment, batch_size=8)
    assert both.describe()["train_images"] == 8 and both.describe()["val_images"] == 2
    assert next(iter(both.train_dataloader()))["image"].shape == (8, 3, 16, 16)
    grey = ImageData(path=str(make_folder(tmp_path / "c", mode="L")))
    assert grey.sizes["in_chans"] == 1 and ImageData(path=str(tmp_path / "c"), in_chans=3).sizes["in_chans"] == 3


@pytest.mark.parametrize("greys", [0, 1, 3, 8])
def test_one_colour_picture_makes_a_colour_data_set(tmp_path, greys):
    root = make_folder(tmp_path)
    for file in sorted(root.rglob("*.png"))[:greys]:
        Image.open(file).convert("L").save(file)
    for broken in ("refuse", "skip"):
        data = ImageData(path=str(root), image_size=8, batch_size=2, broken=broken)
        assert data.channels == (1 if greys == 8 else 3)
        assert next(iter(data.train_dataloader()))["image"].shape[1] == data.channels


def test_every_class_is_trained_on_and_small_sets_fill_a_batch(tmp_path, capsys):
    root = make_folder(tmp_path, count=5)
    make_folder(root, classes=("rare",), count=1)
    data = ImageData(path=str(root), image_size=8, batch_size=64)
    train, val = data._open()
    assert np.bincount(train.labels).tolist() == [4, 4, 1] and np.bincount(val.labels, minlength=3).tolist() == [
        1,
        1,
        0,
    ]
    assert next(iter(data.train_dataloader()))["image"].shape[0] == 8
    printed = capsys.readouterr().out
    assert "single image, trained on and never validated: rare" in printed and "batches of 8" in printed


def test_broken_files_are_named_and_refused_or_skipped(tmp_path, capsys):
    root = make_folder(tmp_path)
    (root / "cat" / "notes.txt").write_text("no picture")
    whole = (root / "dog" / "0.png").read_bytes()
    (root / "dog" / "cut.png").write_bytes(whole[:40])
    with pytest.raises(ValueError, match=r"2 of 10 files .*cat/notes.txt, dog/cut.png.*data.broken=skip"):
        ImageData(path=str(root)).setup()
    data = ImageData(path=str(root), broken="skip")
    assert data.describe()["train_images"] + data.describe()["val_images"] == 8
    assert "2 of 10 files" in capsys.readouterr().out


def test_other_bad_input(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        ImageData(path=str(tmp_path / "nothing")).setup()
    with pytest.raises(ValueError, match="holds no folders"):
        ImageData(path=str(tmp_path)).setup()
    make_folder(tmp_path / "a")
    (tmp_path / "a" / "empty").mkdir()
    with pytest.raises(ValueError, match="class 'empty' has no readable images"):
        ImageData(path=str(tmp_path / "a")).setup()
    with pytest.raises(ValueError, match="choose digits, torchvision"):
        ImageData(dataset="digit").setup()
    with pytest.raises(ValueError, match="nearest: .*cifar10"):
        ImageData(dataset="torchvision/cifar1").setup()
    with pytest.raises(ValueError, match="data.augment.flip is unknown; nearest: vflip, hflip"):
        ImageData(augment={"flip": 0.5})
    with pytest.raises(ValueError, match="in_chans = 4"):
        ImageData(in_chans=4)


def test_files_that_only_look_like_images(tmp_path):
    root = make_folder(tmp_path)
    (root / "cat" / "empty.png").write_bytes(b"")
    (root / "cat" / "text.jpg").write_text("not a picture")
    (root / "cat" / ".hidden").write_text("passed over")
    with pytest.raises(ValueError, match=r"2 of 10 files .*cat/empty.png, cat/text.jpg"):
        ImageData(path=str(root)).setup()
    for file in (root / "dog").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'dog' has no readable images"):
        ImageData(path=str(root), broken="skip").setup()


def test_a_file_that_breaks_while_training_is_named(tmp_path):
    root = make_folder(tmp_path)
    data = ImageData(path=str(root), batch_size=1, image_size=8)
    data.setup()
    for file in root.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"\.png cannot be read .*remove it, write it anew, or set data.broken=skip"):
        list(data.train_dataloader())


def test_validation_with_an_unknown_class_and_wrong_num_classes(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", classes=("cat", "dog", "emu"))
    with pytest.raises(ValueError, match="classes that the training folder does not know: emu"):
        ImageData(path=str(tmp_path)).setup()
    subject = ImageClassification(VMamba(in_chans=1, num_classes=2, depths=(1,), dims=8))
    with pytest.raises(ValueError, match="label 5, but the model has 2 classes .*num_classes=6 or more"):
        subject.step({"image": torch.randn(2, 1, 16, 16), "label": torch.tensor([1, 5])}, training=True)


def test_targets_and_loss():
    labels, logits = torch.tensor([0, 2]), torch.randn(2, 3)
    torch.testing.assert_close(
        soft_cross_entropy(logits, smooth_targets(labels, 3, 0.1)),
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )


def task(**kwargs):
    torch.manual_seed(0)
    return ImageClassification(VMamba(in_chans=1, num_classes=10, depths=(1,), dims=8), **kwargs)


def test_classification_steps_and_confusion():
    batch = {"image": torch.randn(8, 1, 16, 16), "label": torch.arange(8)}
    subject = task()
    assert subject.step(batch, training=True).loss.requires_grad
    subject.eval()
    with torch.no_grad():
        out = subject.step(batch, training=False)
        subject.step(batch, training=False)
    assert set(out.metrics) == {"top1", "top5"} and out.count == 8 and int(subject.confusion.sum()) == 16
    assert task(mixup=0.8, cutmix=1.0, label_smoothing=0.1).step(batch, training=True).loss.isfinite()
    table = torch.tensor([[3, 2], [0, 1]])
    assert confusions(table, ["a", "b"]) == "a taken for b: 2 times"
    with pytest.raises(ValueError, match="label 11, but the model has 10 classes"):
        subject.step(batch | {"label": torch.full((8,), 11)}, training=False)
    with pytest.raises(ValueError, match="label_smoothing"):
        task(label_smoothing=1.5)


def test_training_end_to_end_with_self_distillation(tmp_path):
    import lightning as L

    subject = task(
        mesa=1.0, mesa_start=0.0, mesa_decay=0.5, optim=lambda m: {"optimizer": torch.optim.AdamW(m.parameters(), 2e-3)}
    )
    before = [p.clone() for p in subject.teacher.parameters()]
    trainer = L.Trainer(
        max_steps=2,
        limit_val_batches=2,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        log_every_n_steps=1,
    )
    data = ImageData(image_size=16, batch_size=8)
    trainer.fit(subject, datamodule=data)
    assert "train/mesa" in trainer.callback_metrics
    assert any((a - b).abs().max() > 0 for a, b in zip(before, subject.teacher.parameters()))
    report = subject.report(tmp_path, subject.validation_means())
    assert "linear classifier on pixels, top-1" in report.rows and all(f.exists() for f in report.figures)


def test_torchvision_set_from_its_files(tmp_path):
    """MNIST's own files, with six pictures: what is there already is not downloaded."""
    generator = np.random.default_rng(0)
    raw = tmp_path / "torchvision" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for side, count in (("train", 6), ("t10k", 2)):
        levels, labels = generator.integers(0, 255, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        head = b"\x00\x00\x08\x03" + b"".join(n.to_bytes(4, "big") for n in levels.shape)
        (raw / f"{side}-images-idx3-ubyte").write_bytes(head + levels.tobytes())
        head = b"\x00\x00\x08\x01" + count.to_bytes(4, "big")
        (raw / f"{side}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    data = ImageData("torchvision/mnist", path=str(tmp_path / "torchvision"), image_size=16, batch_size=2)
    facts = data.describe()
    assert (facts["train_images"], facts["val_images"], data.sizes["in_chans"]) == (6, 2, 1)
    assert data.classes[3] == "3 - three" and next(iter(data.val_dataloader()))["label"].tolist() == [0, 1]


def test_hub_set_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)) for i in range(6)]
    train = datasets.Dataset.from_dict({"img": pictures, "fine_label": [0, 1] * 3}, features=features)
    asked = []

    def load(repository, configuration, cache_dir):
        asked.append((repository, configuration))
        return {"train": train, "test": train.select([0, 1])} if configuration else {"train": train}

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = ImageData("hf/someone/pets:small", image_size=8, batch_size=2)
    assert data.classes == ["cat", "dog"] and data.describe()["val_images"] == 2 and data.channels == 3
    assert next(iter(data.val_dataloader()))["image"].shape == (2, 3, 8, 8)
    assert ImageData("hf/someone/pets", val_fraction=0.4).describe()["val_images"] == 2  # one of each class
    assert asked == [("someone/pets", "small"), ("someone/pets", None)]
    train = train.remove_columns("fine_label")
    with pytest.raises(ValueError, match="has the columns img; it needs an image and a class label column"):
        ImageData("hf/someone/pets").setup()
