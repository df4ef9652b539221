"""Photographs: splits, crops that equal the whole picture's degradation, pairs, schedules, picture files, refusals."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ssmzoo.data.image_file import ImageError, Picture, orientation, read_picture, write_picture
from ssmzoo.data.loader import Draw
from ssmzoo.data.photo_patches import Patches
from ssmzoo.data.photos import PhotoData
from ssmzoo.ops.imresize import mod_crop


@pytest.fixture
def folder(tmp_path):
    """Five small pictures in two folders, one of them grey."""
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 50), (37, 61), (48, 48), (64, 33)]):
        file = tmp_path / "clean" / ("a" if i < 2 else "b") / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)).save(file)
    Image.fromarray(rng.integers(0, 256, (40, 40)).astype(np.uint8)).save(tmp_path / "clean" / "grey.png")
    return tmp_path / "clean"


def test_embedded_photographs_are_split_by_photograph():
    train, val = PhotoData().splits()
    assert not {p.name for p in train} & {p.name for p in val} and len(train) >= 6 and len(val) >= 3
    assert train[0].read().shape[-1] == 3


def test_held_out_pictures_stay_out_when_the_folder_grows(folder):
    before = {p.name for p in PhotoData(path=str(folder), holdout=2, patch_size=32).splits()[1]}
    Image.new("RGB", (40, 40)).save(folder / "new.png")
    after = {p.name for p in PhotoData(path=str(folder), holdout=2, patch_size=32).splits()[1]}
    assert len(before) == 2 and len(after & (before | {"new"})) == 2


@pytest.mark.parametrize(
    "kind",
    [
        dict(scale=2),
        dict(scale=3, patch_size=30),
        dict(degradation="jpeg", quality=10),
        dict(degradation="jpeg", quality=30, grey=True, patch_size=20),
    ],
)
def test_a_crop_is_degraded_as_in_the_whole_picture(folder, kind):
    data = PhotoData(path=str(folder), holdout=1, augment=False, **{"patch_size": 24} | kind)
    d, p = data.degradation, data.patch_size
    patches = Patches(data.splits()[0], d, data.grey, p, 1, False)
    for i in range(len(patches)):
        sample = patches[Draw(i, 100 + i, 0)]
        whole = mod_crop(patches.levels(i, False), d.scale) / 255
        low = d.benchmark(whole)
        top, left = patches._corner(whole.shape, i, torch.Generator().manual_seed(100 + i))
        torch.testing.assert_close(sample["gt"], whole[:, top : top + p, left : left + p])
        y, x, q = top // d.scale, left // d.scale, p // d.scale
        if d.kind == "bicubic":
            torch.testing.assert_close(sample["lq"], low[:, y : y + q, x : x + q], atol=0, rtol=0)
        else:  # the blocks at the picture's own border are completed differently
            assert (sample["lq"] - low[:, y : y + q, x : x + q]).abs().mean() < 0.02


def test_batches_repeat_by_seed_and_turn_both_pictures_alike(folder):
    def first(seed):
        return next(
            iter(
                PhotoData(
                    path=str(folder), holdout=1, degradation="noise", sigma=0, patch_size=16, batch_size=6, seed=seed
                ).train_dataloader()
            )
        )

    a, b, c = first(0), first(0), first(1)
    assert torch.equal(a["gt"], b["gt"]) and not torch.equal(a["gt"], c["gt"])
    torch.testing.assert_close(a["lq"], a["gt"])  # sigma 0: any difference would be a transform applied to one only


def test_pairs_are_matched_by_name_and_sizes_are_checked(folder, tmp_path):
    for file in folder.rglob("*.png"):
        small = tmp_path / "low" / file.relative_to(folder).with_suffix(".bmp")
        small.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(file).convert("RGB")
        image.resize((image.width // 2, image.height // 2)).save(small)
    kind = dict(path=str(folder), degraded_path=str(tmp_path / "low"), degradation="paired", patch_size=16, holdout=1)
    batch = next(iter(PhotoData(scale=2, **kind).train_dataloader()))
    assert batch["lq"].shape == (8, 3, 8, 8) and batch["gt"].shape == (8, 3, 16, 16)
    with pytest.raises(ValueError, match=r"pair .* the clean picture is \d+ x \d+, the other \d+ x \d+"):
        next(iter(PhotoData(scale=1, **kind).train_dataloader()))
    (tmp_path / "low" / "grey.bmp").unlink()
    with pytest.raises(ValueError, match="no partner of the name .*: grey; data.degraded_name"):
        PhotoData(scale=2, **kind).setup()


def test_a_schedule_of_patch_sizes_resumes_at_any_batch(folder):
    kind = dict(path=str(folder), holdout=1, degradation="noise", patch_schedule=[[8, 4, 3], [16, 2, 2]], repeats=2)
    loader = PhotoData(**kind).train_dataloader()
    whole, states = [], []
    for batch in loader:
        whole.append(batch["gt"])
        states.append(loader.state_dict())
    assert [tuple(t.shape) for t in whole] == [(4, 3, 8, 8)] * 3 + [(2, 3, 16, 16)] * 2
    for done in (1, 2, 3, 4):
        again = PhotoData(**kind).train_dataloader()
        again.load_state_dict(states[done - 1])
        rest = [batch["gt"] for batch in again]
        assert len(rest) == 5 - done and all(torch.equal(a, b) for a, b in zip(rest, whole[done:]))


def test_an_evaluation_folder_is_taken_whole(folder):
    arguments = PhotoData.for_evaluation({"path": "elsewhere", "scale": 2}, {"path": str(folder)})
    data = PhotoData(**arguments | {"path": None})
    assert len(data.splits()[1]) == 5


@pytest.mark.parametrize(
    "kind, words",
    [
        (dict(degradation="blur"), "choose one of bicubic"),
        (dict(degradation="noise", scale=2), "noise and JPEG"),
        (dict(scale=1), "bicubic takes 2"),
        (dict(scale=3), "not a multiple"),
        (dict(sigma=[50, 15]), "from, to"),
        (dict(path="/nowhere"), "no folder"),
        (dict(degradation="paired"), "degraded_path"),
        (dict(degraded_path="x"), "degradation=paired"),
        (dict(patch_schedule=[[64, 8]]), "patch_schedule"),
        (dict(degradation="jpeg", quality=0), "between 1 and 100"),
        (dict(holdout=0), "at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_words(kind, words):
    with pytest.raises(ValueError, match=words):
        PhotoData(**kind).setup()


def test_a_picture_smaller_than_the_crop_is_named(folder):
    loader = PhotoData(path=str(folder), holdout=1, patch_size=48).train_dataloader()
    with pytest.raises(ValueError, match=r"is \d+ x \d+ pixels, smaller than data.patch_size = 48"):
        list(loader)


DEEP = list(itertools.product([".png", ".tif"], [1, 2, 3, 4], [np.uint8, np.uint16]))


@pytest.mark.parametrize("suffix, channels, dtype", [*DEEP, (".webp", 3, np.uint8), (".webp", 4, np.uint8)])
def test_picture_files_keep_depth_alpha_and_orientation(tmp_path, suffix, channels, dtype):
    values = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (13, 17, channels)).astype(dtype)
    exif = Image.Exif()
    exif[274] = 6
    alpha = channels in (2, 4)
    picture = Picture(values[..., :-1] if alpha else values, values[..., -1] if alpha else None, exif.tobytes())
    write_picture(tmp_path / f"x{suffix}", picture)
    back = read_picture(tmp_path / f"x{suffix}")
    assert back.levels.dtype == dtype and np.array_equal(back.levels, picture.levels)
    assert (back.alpha is not None) == alpha and (not alpha or np.array_equal(back.alpha, picture.alpha))
    assert orientation(back.exif) == 6


def test_sixteen_bit_png_is_what_pillow_reads_too(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (70, 9, 1)).astype(np.uint16)  # more rows than one piece
    write_picture(tmp_path / "x.png", Picture(values))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")).astype(np.uint16), values[..., 0])


def test_palette_and_bilevel_pictures_become_rgb_and_grey(tmp_path):
    Image.new("P", (5, 4), 3).save(tmp_path / "p.png")
    Image.new("1", (5, 4), 1).save(tmp_path / "b.png")
    assert read_picture(tmp_path / "p.png").levels.shape == (4, 5, 3)
    assert read_picture(tmp_path / "b.png").levels.tolist() == [[[255]] * 5] * 4


def test_damaged_pictures_and_impossible_formats_are_refused(tmp_path):
    whole = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:3000])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png", "missing.png"):
        with pytest.raises(ImageError, match=name):
            read_picture(tmp_path / name)
    deep = Picture(np.zeros((2, 2, 3), np.uint16))
    clear = Picture(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.uint8))
    with pytest.raises(ImageError, match="16 bits"):
        write_picture(tmp_path / "x.jpg", deep)
    with pytest.raises(ImageError, match="transparency"):
        write_picture(tmp_path / "x.jpg", clear)


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    target = tmp_path / "x.png"
    target.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ssmzoo.data.image_write._encode", full)
    with pytest.raises(ImageError, match="No space left"):
        write_picture(target, Picture(np.zeros((2, 2, 3), np.uint8)))
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(ImageError, match="could not be written"):
        write_picture(target / "y.png", Picture(np.zeros((2, 2, 3), np.uint8)))


@pytest.mark.parametrize(
    "scale, pattern, given",
    [
        (2, "{}x2", None),
        (4, "{}x4", None),
        (1, "{}", None),
        (4, "{}x4m", "{name}x{scale}m"),
        (2, "low_{}", "low_{name}"),
    ],
)
def test_partners_by_the_names_of_the_released_sets(tmp_path, scale, pattern, given):
    generator = np.random.default_rng(0)
    for i in range(1, 5):
        picture = Picture(generator.integers(0, 256, (64, 64, 3)).astype(np.uint8))
        write_picture(tmp_path / "HR" / f"{i:04d}.png", picture)
        low = Picture(np.ascontiguousarray(picture.levels[::scale, ::scale]))
        write_picture(tmp_path / "LR" / "X" / f"{pattern.format(f'{i:04d}')}.png", low)
    arguments = {"path": str(tmp_path / "HR"), "degraded_path": str(tmp_path / "LR" / "X"), "degradation": "paired"}
    data = PhotoData(**arguments, scale=scale, degraded_name=given, patch_size=32, batch_size=2, holdout=1)
    for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
        assert torch.equal(batch["lq"], batch["gt"][..., ::scale, ::scale]) or scale > 1 and batch["lq"].shape[1] == 3
    whole = next(iter(data.val_dataloader()))
    assert torch.equal(whole["lq"], whole["gt"][..., ::scale, ::scale])


def test_names_of_partners_that_cannot_be_meant(tmp_path):
    with pytest.raises(ValueError, match="data.degraded_name = 'x2' goes with"):
        PhotoData(path="a", degraded_path="b", degradation="paired", scale=2, degraded_name="x2")
    with pytest.raises(ValueError, match="goes with data.degradation=paired"):
        PhotoData(degraded_name="{name}")
    for suffix in (".png", ".bmp"):
        write_picture(tmp_path / f"a{suffix}", Picture(np.zeros((64, 64, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"a\.bmp and .*a\.png differ in their suffix only"):
        PhotoData(path=str(tmp_path), holdout=1).setup()
