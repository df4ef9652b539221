"""TIFF files by tifffile: 16 bits per channel, floating point and alpha, which Pillow alone would cut or refuse."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np

from ssmzoo.data.picture import ORIENTATION, ImageError, Picture, about_exif, resolution, split_alpha, whole_levels

PIXEL_TYPES = {8, 16, 32, 64}  # bits per sample that are read here
ASSOCIATED = 1  # extra sample: alpha that the colours are multiplied by already
DEFLATE = (8, 32946)  # compressions by zlib, whose output may be a thousand times its input
LARGEST_RATIO, LARGEST_PART, SLACK = 1032, 64 << 20, 1 << 12


def read_tiff(path: Path, check_size) -> Picture | None:
    """A grey or RGB TIFF, or None for the kinds that are left to Pillow. `check_size(width, height)` may refuse."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        check_size(page.imagewidth, page.imagelength)
        notes = [f"the first of {len(file.pages)} pages is taken"] if len(file.pages) > 1 else []
        if page.bitspersample not in PIXEL_TYPES or page.photometric.name not in ("MINISBLACK", "MINISWHITE", "RGB"):
            return None
        if page.samplesperpixel > 4 or page.imagedepth != 1:
            raise ImageError(
                f"{page.samplesperpixel} samples of {page.imagedepth} layers per pixel; expected grey or RGB, with or "
                f"without alpha"
            )
        refuse_inflation(page)
        try:
            array = page.asarray()
        except (ValueError, ImportError) as error:  # a compression that needs imagecodecs
            if page.bitspersample == 8:
                return None
            raise ImageError(f"TIFF compression {page.compression.name}: {error}") from None
        if page.dtype.kind == "f":
            notes.append("floating-point samples became 16-bit levels")
        white_is_zero, extra = page.photometric.name == "MINISWHITE", tuple(page.extrasamples or ())
        if page.samplesperpixel > 1 and page.planarconfig == 2:
            array = np.moveaxis(array, 0, -1)
        tags = {tag.code: tag.value for tag in page.tags}
    channels = whole_levels(array[..., None] if array.ndim == 2 else array)
    if channels.ndim != 3 or channels.shape[-1] not in (1, 2, 3, 4):
        raise ImageError(f"samples of shape {channels.shape}; expected grey or RGB, with or without alpha")
    if white_is_zero:
        channels = np.iinfo(channels.dtype).max - channels
    if ASSOCIATED in extra[:1] and channels.shape[-1] in (2, 4):
        channels = _unassociated(channels)
    exif, dpi = _about(path, tags)
    return split_alpha(channels, exif=exif, icc=bytes(tags.get(34675) or b""), notes=notes, dpi=dpi)


def refuse_inflation(page) -> None:
    """Raise ImageError where the stored parts of a page unpack to more than its pixels, before they do."""
    if page.dtype is None:  # of no sample type that tifffile knows, which it says itself
        return
    part = math.prod(page.chunks) * page.dtype.itemsize  # bytes of a strip or tile
    if sum(page.databytecounts) > 1.5 * page.nbytes + SLACK * (1 + len(page.databytecounts)):
        raise ImageError(f"{sum(page.databytecounts):,} bytes are stored for {page.nbytes:,} bytes of pixels: refused")
    if page.compression not in DEFLATE:
        return
    file = page.parent.filehandle
    for offset, size in zip(page.dataoffsets, page.databytecounts):
        if size * LARGEST_RATIO <= max(4 * part, LARGEST_PART):
            continue
        file.seek(offset)
        unpacker = zlib.decompressobj()
        found = len(unpacker.decompress(file.read(size), part + SLACK)) if size else 0
        if found > part:
            raise ImageError(f"a part of {size:,} bytes unpacks to more than its {part:,} bytes of pixels: refused")


def _unassociated(channels: np.ndarray) -> np.ndarray:
    """(y x c) whose colours are multiplied by alpha, the last channel -> colours of their own."""
    top, alpha = np.iinfo(channels.dtype).max, channels[..., -1:].astype(np.float64)
    colours = np.rint(channels[..., :-1] * top / np.maximum(alpha, 1)).clip(0, top).astype(channels.dtype)
    return np.concatenate([colours, channels[..., -1:]], axis=-1)


def _about(path: Path, tags: dict) -> tuple[bytes, tuple[float, float] | None]:
    """EXIF and resolution; from the tags alone where Pillow does not know the file's kind."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return about_exif(image), resolution(image)
    except Exception:  # the pixels are read already; Pillow raises many kinds for what it does not support
        exif = Image.Exif()
        exif[ORIENTATION] = int(tags.get(ORIENTATION, 1))
        return exif.tobytes(), None
