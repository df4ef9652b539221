"""Picture files in and out without losing depth, alpha, colour profile or EXIF (orientation included).

Reads and writes PNG, JPEG, TIFF and WebP; 8 and 16 bits per channel; grey, RGB, and either with alpha. Pixels stay in
the order they are stored in: the EXIF orientation tag travels with them.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
SIXTEEN_BIT = (".png", ".tif", ".tiff")
ORIENTATION = 274  # the TIFF and EXIF tag


class ImageError(ValueError):
    """A picture that cannot be read or written; the message names the file and what to do."""


@dataclass
class Picture:
    """levels  (y x c) uint8 or uint16, c = 1 or 3;  alpha  (y x) of the same type, or None;  exif, icc  raw bytes."""

    levels: np.ndarray
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc: bytes = b""
    notes: list[str] = field(default_factory=list)  # what reading had to change, in words

    @property
    def top(self) -> int:
        """The level of white: 255 or 65535."""
        return int(np.iinfo(self.levels.dtype).max)


def read_picture(path: str | Path) -> Picture:
    """The picture in a file. Raises ImageError for a file that is missing, damaged, cut off or of another kind."""
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if not path.is_file():
        raise ImageError(f"no picture at {path}")
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            found = _read_tiff(path)
            if found is not None:
                return found
        with Image.open(path) as image:
            if image.format == "TIFF":
                image.load()  # Pillow turns a TIFF upright itself while loading and drops the tag
            return _read_pillow(image)
    except ImageError:
        raise
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        struct.error,
        zlib.error,
        EOFError,
        ValueError,
        LookupError,
    ) as error:
        raise ImageError(f"{path} cannot be read as a picture (damaged or cut off?): {error}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is larger than Pillow allows: {error}") from None


def _read_pillow(image) -> Picture:
    frames = getattr(image, "n_frames", 1)
    notes = [f"animated: the first of {frames} frames is taken"] if frames > 1 else []
    deep = _deep_png(image)  # before anything below makes Pillow decode the pixels
    exif, icc = image.info.get("exif", b""), image.info.get("icc_profile", b"")
    if not exif and len(image.getexif()):
        exif = image.getexif().tobytes()
    if deep is not None:
        channels = deep
    elif image.mode in ("I;16", "I;16B", "I;16L", "I"):
        channels = np.asarray(image).astype(np.int64).clip(0, 65535).astype(np.uint16)[..., None]
    else:
        mode = {"1": "L", "P": "RGBA" if "transparency" in image.info else "RGB"}.get(image.mode, image.mode)
        if mode not in ("L", "LA", "RGB", "RGBA"):
            notes.append(f"colour mode {mode} converted to RGB")
            mode, icc = "RGB", b""
        channels = np.array(image.convert(mode))
        channels = channels[..., None] if channels.ndim == 2 else channels
    return _split(channels, exif, icc, notes)


def _split(channels: np.ndarray, exif: bytes, icc: bytes, notes: list[str]) -> Picture:
    """(y x c), c = 1 .. 4, into levels and alpha."""
    alpha = channels.shape[-1] in (2, 4)
    levels = channels[..., :-1] if alpha else channels
    return Picture(
        np.ascontiguousarray(levels), np.ascontiguousarray(channels[..., -1]) if alpha else None, exif, icc, notes
    )


def _deep_png(image) -> np.ndarray | None:
    """(y x c) uint16 of a 16-bit colour or grey-alpha PNG, which Pillow by itself would cut to 8 bits; otherwise None.

    Pillow's decoder takes the first byte of each big-endian sample when told "16B" and the second when told "16L", so
    reading twice gives both. Grey with alpha has as many bytes per pixel as RGBA and is read as that.
    """
    raw = image.tile[0].args if image.format == "PNG" and image.tile else None
    raw = raw[0] if isinstance(raw, tuple) else raw
    if raw not in ("RGB;16B", "RGBA;16B", "LA;16B"):
        return None
    if raw == "LA;16B":
        high_low = _decode(image, "RGBA", "RGBA")
        return (high_low[..., 0::2].astype(np.uint16) << 8) | high_low[..., 1::2]
    mode = raw.split(";")[0]
    return (_decode(image, mode, f"{mode};16B").astype(np.uint16) << 8) | _decode(image, mode, f"{mode};16L")


def _decode(image, mode: str, raw: str) -> np.ndarray:
    from PIL import Image

    image.fp.seek(0)
    content = io.BytesIO(image.fp.read())
    again = Image.open(content)
    again._mode = mode
    again.tile = [t._replace(args=raw) for t in again.tile]
    return np.array(again)


def _read_tiff(path: Path) -> Picture | None:
    """A grey or RGB TIFF of 8 or 16 bits, or None for the kinds that are left to Pillow."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        notes = [f"the first of {len(file.pages)} pages is taken"] if len(file.pages) > 1 else []
        if page.sampleformat == 3:
            raise ImageError(f"{path} holds floating-point samples; convert it to 8- or 16-bit levels first")
        if page.bitspersample not in (8, 16) or page.photometric.name not in ("MINISBLACK", "MINISWHITE", "RGB"):
            return None
        try:
            array = page.asarray()
        except (ValueError, ImportError) as error:  # a compression that needs imagecodecs
            if page.bitspersample == 8:
                return None
            raise ImageError(f"{path} uses TIFF compression {page.compression.name}: {error}") from None
        tags = {t.code: t.value for t in page.tags}
    array = array[..., None] if array.ndim == 2 else array
    if page.planarconfig == 2 and array.shape[0] <= 4 < array.shape[-1]:
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] not in (1, 2, 3, 4):
        raise ImageError(f"{path} has {array.shape[-1]} channels; expected grey or RGB, with or without alpha")
    if page.photometric.name == "MINISWHITE":
        array = np.iinfo(array.dtype).max - array
    exif = _orientation_exif(int(tags.get(ORIENTATION, 1)))
    return _split(array, exif, bytes(tags.get(34675) or b""), notes)


def _orientation_exif(value: int) -> bytes:
    if value == 1:
        return b""
    from PIL import Image

    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif.tobytes()


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    from PIL import Image

    if not exif:
        return 1
    found = Image.Exif()
    found.load(exif)
    return int(found.get(ORIENTATION, 1))


def write_picture(path: str | Path, picture: Picture) -> None:
    """Write under a temporary name, flush, rename: `path` is either complete or untouched.

    The format follows the suffix; 16 bits need PNG or TIFF and alpha cannot go into JPEG. Raises ImageError.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ImageError(f"{path}: the suffix decides the format; expected one of {', '.join(SUFFIXES)}")
    if picture.top > 255 and suffix not in SIXTEEN_BIT:
        raise ImageError(f"{path}: {suffix} cannot hold 16 bits per channel; write .png or .tif")
    if picture.alpha is not None and suffix in (".jpg", ".jpeg", ".bmp"):
        raise ImageError(f"{path}: {suffix} cannot hold transparency; write .png, .tif or .webp")
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=suffix)
        os.close(handle)
        with open(name, "wb") as file:  # by its name, which tifffile asks for
            _encode(file, suffix, picture)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except OSError as error:
        raise ImageError(
            f"{path} could not be written ({error.strerror or error}); what was there before is untouched"
        ) from None
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def _encode(file, suffix: str, picture: Picture) -> None:
    channels = picture.levels
    if picture.alpha is not None:
        channels = np.concatenate([channels, picture.alpha[..., None]], axis=-1)
    if picture.top > 255 and suffix == ".png":
        return _encode_png16(file, channels, picture)
    if suffix in (".tif", ".tiff"):
        return _encode_tiff(file, channels, picture)
    from PIL import Image

    image = Image.fromarray(channels[..., 0] if channels.shape[-1] == 1 else channels)
    options = {
        ".png": {"compress_level": 4},
        ".jpg": {"quality": 95, "subsampling": 0},
        ".jpeg": {"quality": 95, "subsampling": 0},
        ".webp": {"lossless": True, "exact": True},
    }.get(suffix, {})
    kind = "JPEG" if suffix in (".jpg", ".jpeg") else suffix[1:].upper()
    if picture.icc and kind != "BMP":
        options["icc_profile"] = picture.icc
    if picture.exif and kind != "BMP":
        options["exif"] = picture.exif
    image.save(file, kind, **options)


def _encode_png16(file, channels: np.ndarray, picture: Picture) -> None:
    """PNG with 16-bit samples, every row filtered by "up", in pieces of a few rows."""
    height, width, count = channels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[count]

    def chunk(kind: bytes, body: bytes) -> None:
        file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))

    file.write(b"\x89PNG\r\n\x1a\n")
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    if picture.icc:
        chunk(b"iCCP", b"ICC profile\x00\x00" + zlib.compress(picture.icc))
    if picture.exif:
        chunk(b"eXIf", picture.exif.removeprefix(b"Exif\x00\x00"))
    packer = zlib.compressobj(4)
    above = np.zeros((1, width * count * 2), np.uint8)
    for start in range(0, height, 64):
        rows = channels[start : start + 64].astype(">u2").reshape(-1, width * count).view(np.uint8)
        difference = rows - np.concatenate([above, rows[:-1]])
        body = packer.compress(np.concatenate([np.full((len(rows), 1), 2, np.uint8), difference], axis=1).tobytes())
        above = rows[-1:]
        if body:
            chunk(b"IDAT", body)
    chunk(b"IDAT", packer.flush())
    chunk(b"IEND", b"")


def _encode_tiff(file, channels: np.ndarray, picture: Picture) -> None:
    import tifffile

    count = channels.shape[-1]
    extra = [(ORIENTATION, "H", 1, orientation(picture.exif), True)]
    options = {"photometric": "rgb" if count > 2 else "minisblack", "compression": "zlib", "extratags": extra}
    if count in (2, 4):
        options["extrasamples"] = ["unassalpha"]
    if picture.icc:
        options["iccprofile"] = picture.icc
    tifffile.imwrite(file, channels[..., 0] if count == 1 else channels, **options)


def find_pictures(folder: str | Path) -> list[Path]:
    """All picture files below a folder, sorted by name; ImageError when there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ImageError(f"no folder at {folder}")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise ImageError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return files
