"""A decoded picture: integer levels, transparency, and what travels with them (EXIF, colour profile, resolution)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

ORIENTATION = 274  # the TIFF and EXIF tag
EXIF_FOLDERS = (34665, 34853)  # the camera's settings, GPS
ABOUT = (269, 270, 271, 272, ORIENTATION, 285, 305, 306, 315, 316, 33432)  # TIFF tags that hold however it is stored


class ImageError(ValueError):
    """A picture that cannot be read or written; the message names the file and what to do."""


@dataclass
class Picture:
    """levels  (y x c) uint8 or uint16, c = 1 or 3;  alpha  (y x) of the same type, or None;  exif, icc  raw bytes;
    dpi  dots per inch across and down, or None."""

    levels: np.ndarray
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc: bytes = b""
    notes: list[str] = field(default_factory=list)  # what reading had to change, in words
    dpi: tuple[float, float] | None = None

    @property
    def top(self) -> int:
        """The level of white: 255 or 65535."""
        return int(np.iinfo(self.levels.dtype).max)

    def levels8(self) -> np.ndarray:
        """(y x c) uint8: 16-bit levels are rounded to the nearest of 8 bits."""
        if self.top == 255:
            return self.levels
        return ((self.levels.astype(np.uint32) + 128) // 257).astype(np.uint8)

    def image8(self):
        """As a PIL image of mode L or RGB, without transparency."""
        from PIL import Image

        levels = self.levels8()
        return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def whole_levels(samples: np.ndarray) -> np.ndarray:
    """Samples of any type as uint8 or uint16 levels: 8 unsigned bits as they are, wider integers as 16-bit levels,
    floating point from 0 (black) to 1 (white) in steps of 1 / 65535. Raises ImageError beyond those ranges."""
    if samples.dtype.kind == "b":
        return samples.astype(np.uint8) * 255
    if samples.dtype == np.uint8:
        return samples
    top = 1 if samples.dtype.kind == "f" else 127 if samples.dtype == np.int8 else 65535
    low, high = (samples.min(), samples.max()) if samples.size else (0, 0)
    if not (low >= 0 and high <= top):  # NaN too
        raise ImageError(
            f"{samples.dtype} samples from {low:.6g} to {high:.6g}, expected 0 to {top}: where black and white lie is "
            f"not known; convert the picture to 8- or 16-bit levels first"
        )
    if samples.dtype.kind == "f":
        return np.rint(samples.astype(np.float64) * 65535).astype(np.uint16)
    return samples.astype(np.uint8 if samples.dtype == np.int8 else np.uint16)


def split_alpha(channels: np.ndarray, alpha: np.ndarray | None = None, **about) -> Picture:
    """(y x c), c = 1 .. 4, into levels and alpha; `about` are further fields of a Picture."""
    if channels.shape[-1] in (2, 4):
        channels, alpha = channels[..., :-1], np.ascontiguousarray(channels[..., -1])
    return Picture(np.ascontiguousarray(channels), alpha, **about)


def key_alpha(levels: np.ndarray, key: int | tuple[int, ...]) -> np.ndarray:
    """(y x) transparency of a picture (y x c) in which one colour stands for "nothing here"."""
    found = (levels == np.asarray(key, dtype=levels.dtype)).all(-1)
    return np.where(found, 0, np.iinfo(levels.dtype).max).astype(levels.dtype)


def about_exif(image) -> bytes:
    """EXIF of a PIL image without the tags that say how its pixels are stored."""
    from PIL import Image

    found, kept = image.getexif(), Image.Exif()
    for tag in ABOUT:
        value = found.get(tag)
        described = tag == 270 and str(value).startswith(("ImageJ=", '{"shape"', "<?xml"))  # of the file's structure
        if value is not None and not described:
            kept[tag] = value
    for folder in EXIF_FOLDERS:
        if inner := found.get_ifd(folder):
            kept.get_ifd(folder).update(inner)
            kept[folder] = dict(inner)
    return kept.tobytes() if len(kept) else b""


def load_exif(exif: bytes):
    """PIL's Exif object of raw bytes, empty for none."""
    from PIL import Image

    found = Image.Exif()
    if exif:
        found.load(exif)
    return found


def orientation(exif: bytes) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    return int(load_exif(exif).get(ORIENTATION, 1))


def resolution(image) -> tuple[float, float] | None:
    """Dots per inch that a PIL image's file states; None where it states none."""
    try:
        across, down = (float(v) for v in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 0 < across < 1e6 and 0 < down < 1e6 else None
