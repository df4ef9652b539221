"""Writing picture files: complete or not at all, with transparency, colour profile, resolution and EXIF."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

from ssmzoo.data.picture import ABOUT, EXIF_FOLDERS, ORIENTATION, ImageError, Picture, load_exif

JPEG = (".jpg", ".jpeg", ".jfif", ".jpe")
TIFF = (".tif", ".tiff")
PNM = (".ppm", ".pgm", ".pnm")
WRITABLE = (".png", *JPEG, *TIFF, ".webp", ".bmp", *PNM)
SIXTEEN_BIT = (".png", *TIFF)
SOFTWARE = 305  # the tag
OPAQUE = (*JPEG, ".bmp", *PNM)
KINDS = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"} | dict.fromkeys(JPEG, "JPEG") | dict.fromkeys(PNM, "PPM")
OPTIONS = {
    "PNG": {"compress_level": 4},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}


def check_target(path: str | Path, picture: Picture) -> None:
    """Raise ImageError when the format that the suffix of `path` means cannot hold such a picture."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITABLE:
        raise ImageError(f"{path}: the suffix decides the format; expected one of {', '.join(WRITABLE)}")
    if picture.top > 255 and suffix not in SIXTEEN_BIT:
        raise ImageError(f"{path}: {suffix} cannot hold 16 bits per channel; write .png or .tif")
    if picture.alpha is not None and suffix in OPAQUE:
        raise ImageError(f"{path}: {suffix} cannot hold transparency; write .png, .tif or .webp")


def write_picture(path: str | Path, picture: Picture) -> None:
    """Write under a temporary name, flush, rename: `path` is either complete or untouched.

    The format follows the suffix; 16 bits need PNG or TIFF and alpha cannot go into JPEG. Raises ImageError.
    """
    path, name = Path(path), None
    check_target(path, picture)
    suffix = path.suffix.lower()
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
    if suffix in TIFF:
        return _encode_tiff(file, channels, picture)
    from PIL import Image

    image = Image.fromarray(channels[..., 0] if channels.shape[-1] == 1 else channels)
    kind = KINDS[suffix]
    options = dict(OPTIONS.get(kind, {}))
    if kind not in ("BMP", "PPM"):
        options |= {"icc_profile": picture.icc} if picture.icc else {}
        options |= {"exif": picture.exif} if picture.exif else {}
    if picture.dpi and kind not in ("WEBP", "PPM"):
        options["dpi"] = picture.dpi
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
    if picture.dpi:
        chunk(b"pHYs", struct.pack(">IIB", *(round(v / 0.0254) for v in picture.dpi), 1))  # per metre
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

    count, exif = channels.shape[-1], load_exif(picture.exif)
    folders = {tag: found for tag in EXIF_FOLDERS if (found := exif.get_ifd(tag))}
    extra = [(tag, "s", 0, str(exif[tag]), True) for tag in ABOUT if tag in exif and tag not in (SOFTWARE, ORIENTATION)]
    extra.append((ORIENTATION, "H", 1, int(exif.get(ORIENTATION, 1)), True))
    extra += [(tag + 1, "I", 1, 0, True) for tag in folders]  # placeholders: tifffile refuses the tags themselves
    options = {"photometric": "rgb" if count > 2 else "minisblack", "compression": "zlib", "extratags": extra}
    options |= {"software": str(exif[SOFTWARE]) if SOFTWARE in exif else False, "metadata": None}
    if count in (2, 4):
        options["extrasamples"] = ["unassalpha"]
    if picture.icc:
        options["iccprofile"] = picture.icc
    if picture.dpi:
        options |= {"resolution": picture.dpi, "resolutionunit": "INCH"}
    tifffile.imwrite(file, channels[..., 0] if count == 1 else channels, **options)
    file.flush()
    for tag, found in folders.items():
        _append_folder(file.name, tag, found)


def _append_folder(name: str, tag: int, entries: dict) -> None:
    """Put an EXIF folder behind a TIFF file, and make its entry `tag + 1` the entry `tag` that points there."""
    import tifffile
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with tifffile.TiffFile(name) as tiff:
        order, entry = tiff.byteorder, tiff.pages[0].tags[tag + 1]
    folder = ImageFileDirectory_v2(prefix=b"II" if order == "<" else b"MM")
    folder.update(entries)
    with open(name, "r+b") as file:
        start = file.seek(0, os.SEEK_END)
        start += file.write(b"\0" * (start % 2))
        if start >= 1 << 32:  # the entry is 32 bits wide
            return
        file.write(folder.tobytes(start))
        file.seek(entry.offset)
        file.write(struct.pack(f"{order}H", tag))
        file.seek(entry.valueoffset)
        file.write(struct.pack(f"{order}I", start))
