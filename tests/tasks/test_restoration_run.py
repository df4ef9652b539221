"""Training, evaluation and `ssmzoo restore` as a user runs them, on small pictures."""

import csv
import sys

import numpy as np
import pytest
from PIL import Image

from ssmzoo.data.image_file import SUFFIXES, WRITABLE, Picture, orientation, read_picture, write_picture

TINY = [
    "model.embed_dim=30",
    "model.depths=[1]",
    "model.d_state=2",
    "data.patch_size=16",
    "data.batch_size=2",
    "data.holdout=1",
    "data.val_crop=24",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "name=a",
]


def photo(size, seed=0):
    """Smooth noise (y x 3) uint8."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    return np.asarray(small.resize((size[1], size[0]), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        Image.fromarray(photo((32 + i, 40), i)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """A run folder of MambaIR x2 after two steps."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "model=mambair", f"data.path={photos}", f"runs_dir={runs}", *TINY])
        from ssmzoo.cli import train

        train.train()
    return runs / "mambair" / "a"


@pytest.mark.parametrize(
    "model, task",
    [
        ("mambair", "denoise"),
        ("mambair", "jpeg"),
        ("mambair", "jpeg_grey"),
        ("mambair_v2", "restoration"),
        ("mambair_v2", "denoise"),
    ],
)
def test_every_pairing_trains_and_leaves_its_results(call, tmp_path, photos, model, task):
    size = ["model.window_size=4", "model.num_heads=2"] if model == "mambair_v2" else []
    status, out, err = call(
        f"model={model}", f"task={task}", f"data.path={photos}", f"runs_dir={tmp_path}", *TINY, *size
    )
    assert (status, err) == (0, "")
    run = tmp_path / model / "a"
    assert (run / "comparison.png").stat().st_size > 0 and "per picture" in out and "gain" in out
    rows = list(csv.DictReader((run / "per_image.csv").open()))
    assert len(rows) == 1 and {"name", "psnr", "ssim", "baseline_psnr", "baseline_ssim"} == set(rows[0])


def test_evaluation_of_another_folder_and_of_another_scale(call, trained, photos, tmp_path):
    status, out, _ = call(f"ckpt={trained}", f"data.path={photos}", f"out={tmp_path}", entry="eval")
    assert status == 0 and "mean over 3 held-out pictures" in out
    assert len(list(csv.DictReader((tmp_path / "per_image.csv").open()))) == 3
    status, _, err = call(f"ckpt={trained}", "data.scale=4", f"out={tmp_path}", entry="eval")
    assert status == 2 and "upscale" in err and "4" in err
    Image.fromarray(photo((3, 3))).save(tmp_path / "tiny.png")
    status, _, err = call(f"ckpt={trained}", f"data.path={tmp_path}", f"out={tmp_path}", entry="eval")
    assert status == 1 and "tiny cannot be measured" in err and err.count("\n") == 1


def test_a_model_of_another_scale_is_refused(call, photos, tmp_path):
    status, _, err = call("model=mambair", "model.upscale=4", f"data.path={photos}", f"runs_dir={tmp_path}", *TINY)
    assert status != 0 and "enlarges by 4" in err


def test_restoring_a_folder_keeps_depth_alpha_orientation_and_continues(call, trained, tmp_path):
    pictures, out = tmp_path / "in", tmp_path / "out"
    exif = Image.Exif()
    exif[274] = 8
    rgb = photo((9, 13))
    cases = {
        "rgb.png": Picture(rgb, exif=exif.tobytes()),
        "sub/grey.png": Picture(rgb[..., :1]),
        "alpha.png": Picture(rgb, rgb[..., 0]),
        "deep.png": Picture(rgb.astype(np.uint16) * 257),
        "deep.tif": Picture(rgb.astype(np.uint16) * 257, exif=exif.tobytes()),
        "photo.jpg": Picture(photo((17, 8))),
        "one.webp": Picture(photo((1, 1))),
    }
    for name, picture in cases.items():
        write_picture(pictures / name, picture)
    command = ["restore", str(pictures), "--ckpt", str(trained), "--task", "sr", "--scale", "2", "--device", "cpu"]
    status, printed, err = call(*command, "-o", str(out), entry="ssmzoo")
    assert (status, err) == (0, "") and "7 restored" in printed
    for name, given in cases.items():
        got = read_picture(out / name)
        assert got.levels.shape == (2 * given.levels.shape[0], 2 * given.levels.shape[1], given.levels.shape[2]), name
        assert got.levels.dtype == given.levels.dtype and (got.alpha is None) == (given.alpha is None), name
        assert orientation(got.exif) == orientation(given.exif), name
    before = (out / "rgb.png").stat().st_mtime_ns
    (out / "alpha.png").unlink()
    status, printed, _ = call(*command, "-o", str(out), entry="ssmzoo")
    assert status == 0 and "1 restored, 6 kept" in printed and (out / "rgb.png").stat().st_mtime_ns == before
    status, printed, _ = call(*command, "-o", str(out), "--overwrite", entry="ssmzoo")
    assert status == 0 and "7 restored, 0 kept" in printed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_of_picture_is_restored_and_the_others_are_named(call, trained, tmp_path, suffix):
    picture = Image.fromarray(photo((9, 13)))
    (tmp_path / "linked").mkdir()
    (tmp_path / "in").mkdir()
    picture.save(tmp_path / "linked" / f"a{suffix}", dpi=(300, 300))
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "linked")
    (tmp_path / "in" / "b.heic").write_bytes(b"other")
    command = ["restore", str(tmp_path / "in"), "--ckpt", str(trained), "--device", "cpu", "-o", str(tmp_path / "out")]
    status, printed, err = call(*command, entry="ssmzoo")
    assert (status, err) == (0, "") and "1 restored" in printed and "passed over" in printed and "b.heic" in printed
    target = tmp_path / "out" / "folder" / (f"a{suffix}" if suffix in WRITABLE else f"a{suffix}.png")
    got = read_picture(target)
    assert got.levels.shape[:2] == (18, 26)
    if suffix in (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".bmp"):
        assert np.allclose(got.dpi, 300, rtol=1e-3)
    assert "0 restored, 1 kept" in call(*command, entry="ssmzoo")[1]


def test_what_the_target_cannot_hold_is_said_before_the_work(call, trained, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr("ssmzoo.inference.restore.restore_levels", never)
    write_picture(tmp_path / "deep.png", Picture(photo((9, 9)).astype(np.uint16)))
    write_picture(tmp_path / "clear.png", Picture(photo((9, 9)), photo((9, 9))[..., 0]))
    for name, words in (("deep", "cannot hold 16 bits"), ("clear", "cannot hold transparency")):
        command = ["restore", str(tmp_path / f"{name}.png"), "--ckpt", str(trained), "-o", str(tmp_path / "x.jpg")]
        status, _, err = call(*command, entry="ssmzoo")
        assert status == 1 and words in err


def test_a_damaged_picture_does_not_stop_the_others(call, trained, tmp_path):
    Image.fromarray(photo((8, 8))).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    Image.fromarray(photo((8, 8))).save(tmp_path / "c.png")
    out = tmp_path / "out"
    status, printed, err = call(
        "restore", str(tmp_path), "--ckpt", str(trained), "-o", str(out), "--device", "cpu", entry="ssmzoo"
    )
    assert status == 1 and "2 restored, 0 kept, 1 failed" in printed and "b.png cannot be read" in err
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "c.png"]


def test_beside_the_input_and_tiles_that_change_little(call, trained, tmp_path):
    Image.fromarray(photo((70, 60))).save(tmp_path / "a.png")
    command = ["restore", str(tmp_path / "a.png"), "--ckpt", str(trained), "--device", "cpu"]
    assert call(*command, entry="ssmzoo")[0] == 0
    whole = read_picture(tmp_path / "a_x2.png").levels
    command += ["--tile", "32", "--overlap", "8", "-o", str(tmp_path / "t.png")]
    assert call(*command, entry="ssmzoo")[0] == 0
    assert np.abs(whole.astype(int) - read_picture(tmp_path / "t.png").levels).mean() < 2


@pytest.mark.parametrize(
    "more, words",
    [
        (["--scale", "4"], "built for x2"),
        (["--task", "denoise"], "trained for sr"),
        (["--overlap", "100"], "--overlap"),
        (["-o", "{here}/a.png"], "is the input itself"),
        (["--model", "mamba"], "does not restore"),
        (["-o", "{here}/a.gif"], "neither a folder nor"),
        (["--tile", "0"], "--tile is 0"),
        (["--device", "abacus"], "--device is abacus"),
    ],
)
def test_what_the_user_gets_wrong_is_said_in_one_line(call, trained, tmp_path, more, words):
    Image.fromarray(photo((8, 8))).save(tmp_path / "a.png")
    more = [m.format(here=tmp_path) for m in more]
    command = ["restore", str(tmp_path / "a.png"), "--ckpt", str(trained), *more]
    status, _, err = call(*command, entry="ssmzoo")
    assert status == 2 and words in err and err.count("\n") == 1


def test_a_released_weight_file_restores_by_the_name_of_its_preset(call, tmp_path):
    import torch

    from ssmzoo import create_model

    torch.save({"params": create_model("mambair_light_x2").state_dict()}, tmp_path / "w.pth")
    Image.fromarray(photo((5, 6))).save(tmp_path / "a.png")
    status, out, err = call(
        "restore",
        str(tmp_path / "a.png"),
        "--ckpt",
        str(tmp_path / "w.pth"),
        "--model",
        "mambair_light_x2",
        "--device",
        "cpu",
        entry="ssmzoo",
    )
    assert (status, err) == (0, "") and "12 x 10" in out


def test_another_scale_starts_from_these_weights_as_far_as_they_fit(call, trained, photos, tmp_path):
    import torch

    from ssmzoo.checkpoint_files import read_weights

    more = [*TINY, "data.scale=4", f"init_from={trained}", "optim.lr=0", f"data.path={photos}", f"runs_dir={tmp_path}"]
    status, out, err = call("model=mambair", *more)
    assert (status, err) == (0, "") and "new: upsample.0.weight, upsample.0.bias" in out
    old, new = read_weights(trained), read_weights(tmp_path / "mambair" / "a")
    same = [k for k in new if new[k].shape == old[k].shape]
    assert len(same) == len(new) - 2 and all(torch.equal(old[k], new[k]) for k in same)
    status, _, err = call("model=mambair", *more, "model.embed_dim=36", "name=b")
    assert status == 2 and "weights of another model" in err and err.count("\n") == 1
    status, _, err = call("model=mambair", *more, "init_from=/nowhere", "name=b")
    assert status == 2 and "/nowhere" in err


@pytest.mark.parametrize("name, depth", [("x.jpg", 8), ("x.tif", 8), ("x.tif", 16), ("x.webp", 8), ("x.png", 16)])
def test_cut_and_garbled_files_of_every_kind_are_named(tmp_path, name, depth):
    from ssmzoo.data.image_file import ImageError

    levels = np.random.default_rng(0).integers(0, 256, (60, 50, 3)).astype(np.uint8)
    write_picture(tmp_path / name, Picture(levels if depth == 8 else levels.astype(np.uint16) * 257))
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:4] + b"\0" * 200):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ImageError, match=name):
            read_picture(tmp_path / name)


def test_a_damaged_training_picture_ends_the_run_with_its_name(call, photos, tmp_path):
    for file in photos.iterdir():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes()[:200])
    status, _, err = call("model=mambair", f"data.path={tmp_path / 'in'}", f"runs_dir={tmp_path}", *TINY)
    assert status in (1, 2) and ".png cannot be read as a picture" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "more, words",
    [
        (["data.patch_size=64"], "smaller than data.patch_size = 64"),
        (
            ["task=real_denoise", "data.degraded_path={other}"],
            "pair 0: the clean picture is 32 x 40, the other 31 x 40",
        ),
        (["task=real_denoise", "data.degraded_path={empty}"], "holds no picture"),
    ],
)
def test_pictures_that_do_not_fit_end_the_run_in_words(call, photos, tmp_path, more, words):
    (tmp_path / "other").mkdir()
    (tmp_path / "empty").mkdir()
    for file in photos.iterdir():
        Image.open(file).crop((0, 0, 40, 31)).save(tmp_path / "other" / file.name)
    more = [m.format(other=tmp_path / "other", empty=tmp_path / "empty") for m in more]
    status, _, err = call("model=mambair", *TINY, f"data.path={photos}", f"runs_dir={tmp_path}", *more)
    assert status in (1, 2) and err.count("\n") == 1
    assert words in err or ("other" in more[-1] and "the other 31 x 40" in err)


def test_a_colour_picture_meets_a_grey_model_and_the_others_go_on(call, monkeypatch, tmp_path):
    import torch

    from ssmzoo import create_model

    torch.save(create_model("mambair_jpeg", embed_dim=30, depths=[1], d_state=2).state_dict(), tmp_path / "w.pth")
    small = {"embed_dim": 30, "depths": [1], "d_state": 2}
    monkeypatch.setattr("ssmzoo.zoo.create_model", lambda name, **more: create_model(name, **small, **more))
    write_picture(tmp_path / "in" / "colour.png", Picture(photo((9, 9))))
    write_picture(tmp_path / "in" / "grey.png", Picture(photo((9, 9))[..., :1]))
    status, out, err = call(
        "restore",
        str(tmp_path / "in"),
        "--ckpt",
        str(tmp_path / "w.pth"),
        "--model",
        "mambair_jpeg",
        "-o",
        str(tmp_path / "out"),
        entry="ssmzoo",
    )
    assert status == 1 and "1 restored, 0 kept, 1 failed" in out
    assert "colour.png: the picture has 3 colour channels and the model takes 1" in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["grey.png"]


def test_a_full_disk_keeps_what_is_done_and_leaves_nothing_half_written(call, monkeypatch, trained, tmp_path):
    import os

    for name in ("a.png", "b.png", "c.png"):
        write_picture(tmp_path / "in" / name, Picture(photo((9, 9))))
    real, calls = os.fsync, []

    def fills_up(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("ssmzoo.data.image_write.os.fsync", fills_up)
    command = ["restore", str(tmp_path / "in"), "--ckpt", str(trained), "-o", str(tmp_path / "out"), "--device", "cpu"]
    status, out, err = call(*command, entry="ssmzoo")
    assert status == 1 and "b.png could not be written (No space left on device)" in err
    assert "1 restored, 0 kept, 1 failed" in out and [p.name for p in (tmp_path / "out").iterdir()] == ["a.png"]
    status, out, _ = call(*command, entry="ssmzoo")  # there is room again
    assert status == 0 and "2 restored, 1 kept" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.png", "b.png", "c.png"]
