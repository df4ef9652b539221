"""One reader of pictures: every mode and sample type that Pillow and tifffile write, in every format by its suffix."""

import io
import itertools
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageMode
from tried import tried

from ssmzoo.data.image_file import (
    DEEP_MODES,
    SUFFIXES,
    WRITABLE,
    ImageError,
    Picture,
    find_pictures,
    read_image8,
    read_picture,
    write_picture,
)
from ssmzoo.data.images import ImageData

Image.init()
RAMP = np.linspace(0, 1, 48 * 64).reshape(48, 64)  # every level, black to white
LOSSY = {".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".gif"}


def share_of_white(picture):
    """(y x) in [0, 1]: the mean over channels."""
    return picture.levels.mean(-1) / picture.top


def ramp_in(mode):
    """The ramp as a PIL image of a mode, or None for modes without a grey axis of their own."""
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32))
    if mode == "I":
        return Image.fromarray(np.rint(RAMP * 65535).astype(np.int32))
    if mode.startswith("I;16"):
        kind = ">u2" if ImageMode.getmode(mode).typestr == ">u2" else "<u2"
        return Image.frombytes(mode, (64, 48), np.rint(RAMP * 65535).astype(kind).tobytes())
    grey = Image.fromarray(np.rint(RAMP * 255).astype(np.uint8))
    try:
        return grey.convert(mode) if mode not in ("PA", "La", "RGBa") else None
    except ValueError:
        return grey.convert("RGB").convert(mode) if mode in ("HSV", "CMYK") else None


def pillow_writes(mode: str, suffix: str) -> bool:
    """Whether Pillow can make such a file of a ramp; .gif and .webp it clips itself in deep modes."""
    image = ramp_in(mode)
    if image is None or (suffix in (".gif", ".webp") and mode in (*DEEP_MODES, "LAB")):
        return False
    try:
        image.save(io.BytesIO(), Image.registered_extensions()[suffix])
    except (OSError, ValueError, KeyError):
        return False
    return True


def pillow_reads(path) -> bool:
    """Pillow 12 cannot read a TIFF of YCbCr that it wrote."""
    try:
        Image.open(path).load()
    except OSError:
        return False
    return True


WRITTEN = [pair for pair in itertools.product(sorted(Image.MODES), SUFFIXES) if pillow_writes(*pair)]


def test_every_suffix_and_common_mode_is_among_what_pillow_writes():
    assert {suffix for _, suffix in WRITTEN} == set(SUFFIXES)
    assert {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"} <= {mode for mode, _ in WRITTEN}


@pytest.mark.parametrize("mode, suffix", WRITTEN)
def test_whatever_pillow_writes_comes_back_or_is_refused_in_words(tmp_path, mode, suffix):
    image, path = ramp_in(mode), tmp_path / f"x{suffix}"
    image.save(path)
    try:
        got = read_picture(path)
    except ImageError as error:
        assert "x" + suffix in str(error) and (mode in ("LAB", "HSV") or not pillow_reads(path))
        return
    expected = np.asarray(image.convert("L")) / 255 if mode in ("1", "P", "CMYK", "HSV", "YCbCr") else RAMP
    error = np.abs(share_of_white(got) - expected)
    assert error.mean() < (0.02 if suffix in LOSSY else 0.004), (mode, suffix, error.mean())
    fast = read_image8(path)
    assert fast.mode in ("L", "RGB") and np.array_equal(fast, got.image8())


KINDS = ["uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64", "bool"]


LAYOUTS = (("minisblack", 1), ("minisblack", 2), ("miniswhite", 1), ("miniswhite", 2), ("rgb", 3), ("rgb", 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("photometric, channels", LAYOUTS)
def test_whatever_tifffile_writes_comes_back(tmp_path, kind, photometric, channels):
    top = 1 if np.dtype(kind).kind in "fb" else min(65535, np.iinfo(kind).max)
    levels = (RAMP > 0.5) if kind == "bool" else RAMP * top if top == 1 else np.rint(RAMP * top)
    array = np.repeat(levels[..., None], channels, -1).astype(kind)
    extra = ["unassalpha"] if channels in (2, 4) else None
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, array[..., 0] if channels == 1 else array, photometric=photometric, extrasamples=extra)
    if kind == "bool" and channels > 1:
        with pytest.raises(ImageError, match="x.tif"):
            read_picture(path)
        return
    got = read_picture(path)
    # samples of wider types are 16-bit levels, so that int16 reaches half of white
    expected = levels / (
        top if np.dtype(kind).kind in "fb" else 65535 if got.top > 255 else top if kind == "uint8" else 255
    )
    expected = 1 - expected if photometric == "miniswhite" else expected
    assert np.abs(share_of_white(got) - expected).max() < 0.005
    assert (got.alpha is not None) == (channels in (2, 4))


@pytest.mark.parametrize(
    "samples",
    [
        np.float32([[-0.1, 1]]),
        np.float32([[0, 255]]),
        np.float32([[0, np.nan]]),
        np.int32([[0, 70000]]),
        np.int16([[-1000, 3000]]),
    ],
)
def test_samples_without_a_known_white_are_refused(tmp_path, samples):
    tifffile.imwrite(tmp_path / "x.tif", samples)
    with pytest.raises(ImageError, match=r"x.tif .*samples from .* expected 0 to (1|65535).*convert"):
        read_picture(tmp_path / "x.tif")


def test_twelve_bits_are_stretched_to_sixteen(tmp_path):
    twelve = np.rint(RAMP * 4095).astype(np.uint16)
    a, b = twelve[:, 0::2].astype(int), twelve[:, 1::2].astype(int)
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    entries = [(256, 3, 64), (257, 3, 48), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
               (278, 3, 48), (279, 4, len(packed))]  # fmt: skip
    body = b"".join(np.array([t, k], "<u2").tobytes() + np.array([1, v], "<u4").tobytes() for t, k, v in entries)
    head = b"II*\0" + np.array([8 + len(packed)], "<u4").tobytes()
    file = head + packed + np.array([len(entries)], "<u2").tobytes() + body + b"\0\0\0\0"
    (tmp_path / "x.tif").write_bytes(file)
    assert np.abs(share_of_white(read_picture(tmp_path / "x.tif")) - RAMP).max() < 1e-3


@pytest.mark.parametrize("suffix", [".tif", ".png", ".gif", ".bmp", ".ppm"])
def test_a_file_that_claims_a_huge_size_is_refused_before_decoding(tmp_path, suffix, monkeypatch, capsys):
    tried("hostile pictures")
    monkeypatch.setenv("SSMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / f"x{suffix}"
    Image.new("L", (64, 64)).save(path)
    with pytest.raises(ImageError, match=f"x{suffix} .*(64 x 64|4096) pixels"):
        read_picture(path)
    for name in ("a", "b"):
        for i in range(3):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8)).save(tmp_path / "data" / name / f"{i}.png")
    path.rename(tmp_path / "data" / "a" / path.name)
    with pytest.raises(ValueError, match=f"1 of 7 files .*a/x{suffix}"):
        ImageData(path=str(tmp_path / "data")).setup()
    assert (
        len(ImageData(path=str(tmp_path / "data"), broken="skip").describe())
        and f"a/x{suffix}" in capsys.readouterr().out
    )


def claim(path, data: bytes, **tags: int):
    """A TIFF of one strip `data` whose tags say what they like."""
    known = {"width": 256, "height": 257, "bits": 258, "compression": 259, "samples": 277, "depth": 32997}
    given = {"width": 32, "height": 32, "bits": 8, "compression": 8, "samples": 1} | tags
    entries = {known[name]: value for name, value in given.items()}
    entries |= {262: 2 if given["samples"] > 2 else 1, 273: 8, 278: given["height"], 279: len(data)}
    rows = [
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
        for tag, value in sorted(entries.items())
    ]
    head = b"II*\0" + np.array([8 + len(data)], "<u4").tobytes()
    path.write_bytes(head + data + np.array([len(rows)], "<u2").tobytes() + b"".join(rows) + bytes(4))


def zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


@pytest.mark.parametrize(
    "tags, data",
    [
        ({"samples": 60_000, "width": 2000, "height": 2000}, zlib.compress(bytes(1000))),
        ({"depth": 100_000, "width": 1000, "height": 1000}, zlib.compress(bytes(1000))),
        ({}, zeros(64)),
        ({"bits": 16, "samples": 3}, zeros(64)),
        ({"width": 300, "height": 300}, zeros(80)),
        ({"compression": 32773}, b"\x81\0" * 300_000),
    ],
    ids=["samples", "layers", "inflation", "of 16 bits", "within the stored size", "packbits"],
)
def test_a_tiff_that_would_unpack_to_more_than_its_pixels_is_refused_first(tmp_path, tags, data, monkeypatch):
    tried("hostile pictures")
    claim(tmp_path / "x.tif", data, **tags)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: pytest.fail("it was unpacked"))
    for reader in (read_picture, read_image8):
        with pytest.raises(ImageError, match="x.tif .*(refused|samples of)"):
            reader(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_pictures_that_only_fail_when_decoded_are_skipped(tmp_path, suffix, capsys, monkeypatch):
    monkeypatch.setenv("SSMZOO_CACHE", str(tmp_path / "cache"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            noise.save(tmp_path / "data" / name / f"{i}{suffix}")
    cut = tmp_path / "data" / "b" / f"2{suffix}"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 3 // 4])
    for _ in range(2):  # the second time from what the first one remembered
        data = ImageData(path=str(tmp_path / "data"), broken="skip", batch_size=2, image_size=8)
        assert data.describe()["train_images"] + data.describe()["val_images"] == 5
        assert f"1 of 6 files in {tmp_path / 'data'} are no readable images: b/2{suffix}" in capsys.readouterr().out
        assert len(list(data.train_dataloader())) == 1


@pytest.mark.parametrize("suffix, sixteen", list(itertools.product(WRITABLE, (False, True))))
def test_resolution_exif_profile_and_transparency_survive(tmp_path, suffix, sixteen):
    levels = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint16 if sixteen else np.uint8)
    exif = Image.Exif()
    exif[271], exif[306], exif[274] = "Camera", "2020:01:02 03:04:05", 6
    exif.get_ifd(34665)[33434] = 0.5
    given = Picture(levels, exif=exif.tobytes(), icc=b"profile", dpi=(300.0, 150.0))
    try:
        write_picture(tmp_path / f"x{suffix}", given)
    except ImageError as error:
        assert sixteen and "cannot hold 16 bits" in str(error)
        return
    got = read_picture(tmp_path / f"x{suffix}")
    found = Image.Exif()
    found.load(got.exif)
    if suffix not in (".bmp", ".ppm", ".pgm", ".pnm"):
        assert (found[271], found[306], found[274], got.icc) == ("Camera", "2020:01:02 03:04:05", 6, b"profile")
        assert found.get_ifd(34665).get(33434) == 0.5
    if suffix not in (".webp", ".ppm", ".pgm", ".pnm"):
        assert np.allclose(got.dpi, (300, 150), rtol=1e-3)


@pytest.mark.parametrize("mode, key", [("L", 7), ("RGB", (7, 7, 7)), ("P", 0), ("I;16", 7), ("1", 0)])
def test_a_transparent_colour_becomes_alpha(tmp_path, mode, key):
    array = np.zeros((4, 6), np.uint16 if mode == "I;16" else np.uint8)
    array[:2] = 7
    image = Image.fromarray(array) if mode == "I;16" else Image.fromarray(array).convert(mode)
    image.save(tmp_path / "x.png", transparency=key)
    alpha = read_picture(tmp_path / "x.png").alpha
    assert alpha is not None and alpha.min() == 0 and {0, int(np.iinfo(alpha.dtype).max)} >= set(np.unique(alpha))


def test_linked_folders_are_read_once(tmp_path):
    (tmp_path / "real").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "real" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "data")
    assert [p.name for p in find_pictures(tmp_path / "data")] == ["a.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_bytes_give_a_picture_or_an_error_with_the_name(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"x{suffix}"
    Image.fromarray(rng.integers(0, 256, (24, 31, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    assert read_picture(path).levels.shape[:2] == (24, 31)
    for _ in range(60):
        tried("damaged pictures")
        damaged = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 400), rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)] if rng.random() < 0.3 else damaged)
        for reader in (read_picture, read_image8):
            try:
                reader(path)
            except ImageError as error:
                assert str(path) in str(error)
