"""Picture files in and out without losing depth, alpha, colour profile, resolution or EXIF (orientation included).

One reader for classification and restoration: PNG, JPEG, TIFF, WebP, BMP, GIF (first frame) and PNM; 8 and 16 bits per
channel, 32-bit integers, floating point; grey, RGB, palettes, and alpha. Pixels stay in the order they are stored in:
the EXIF orientation tag travels with them.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ssmzoo.data.image_tiff import read_tiff
from ssmzoo.data.image_write import JPEG, TIFF, WRITABLE, check_target, write_picture
from ssmzoo.data.picture import (
    ImageError,
    Picture,
    about_exif,
    key_alpha,
    orientation,
    resolution,
    split_alpha,
    whole_levels,
)

__all__ = [
    "ImageError",
    "Picture",
    "SUFFIXES",
    "WRITABLE",
    "check_size",
    "check_target",
    "find_pictures",
    "is_grey",
    "orientation",
    "picture_of",
    "read_image8",
    "read_picture",
    "walk_files",
    "write_picture",
]

SUFFIXES = (".png", *JPEG, *TIFF, ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # grey of more than 8 bits
GREY_MODES = ("1", "L", "LA", "La", *DEEP_MODES)


def read_picture(path: str | Path) -> Picture:
    """The picture in a file. Raises ImageError for a file that is missing, damaged, too large or of another kind."""
    with _named_errors(path), _opened(path) as found:
        return found if isinstance(found, Picture) else picture_of(found)


def read_image8(path: str | Path):
    """`read_picture(path).image8()`, in half the time for what Pillow holds as such already."""
    with _named_errors(path), _opened(path) as found:
        if (
            not isinstance(found, Picture)
            and found.mode in ("L", "RGB")
            and _raw(found)[0] in ("L", "RGB", "JPEG", None)
        ):
            found.load()
            return found.copy()
        return (found if isinstance(found, Picture) else picture_of(found)).image8()


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A Picture of a TIFF that is read whole, or else a PIL image with its pixels still to be decoded."""
    from PIL import Image

    path = Path(path)
    found = read_tiff(path, check_size) if path.suffix.lower() in TIFF else None
    if found is not None:
        yield found
        return
    with Image.open(path) as image:
        check_size(*image.size)
        if image.format == "TIFF":
            image.load()  # Pillow applies a TIFF's orientation itself while loading and drops the tag
        yield image


@contextlib.contextmanager
def _named_errors(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside becomes an ImageError that names the file."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise ImageError(f"no picture at {path}")
    try:
        yield
    except (ImageError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read as a picture: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} cannot be read as a picture (damaged or cut off, or of another kind)") from None
    except Exception as error:  # what decoders raise over hostile bytes has no common base
        reason = str(error) or type(error).__name__
        raise ImageError(f"{path} cannot be read as a picture (damaged or cut off?): {reason}") from None


def check_size(width: int, height: int) -> None:
    """Raise ImageError above twice PIL.Image.MAX_IMAGE_PIXELS, where Pillow gives up too."""
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS and 2 * Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ImageError(
            f"{width} x {height} pixels are more than the {limit} that are decoded (a file can claim any size); cut it "
            f"into smaller pictures"
        )


def is_grey(image) -> bool:
    """Whether a PIL image, decoded or not, holds no colour; a palette counts as colour."""
    return image.mode in GREY_MODES


def picture_of(image) -> Picture:
    """The picture in a PIL image, opened from a file or made in memory."""
    frames = getattr(image, "n_frames", 1)
    notes = [f"animated: the first of {frames} frames is taken"] if frames > 1 else []
    deep = _deep_png(image)  # before anything below makes Pillow decode the pixels
    about = {"icc": image.info.get("icc_profile", b"") or b"", "dpi": resolution(image), "notes": notes}
    exif = image.info.get("exif", b"") if image.format != "TIFF" else b""
    about["exif"] = exif or about_exif(image)
    key = image.info.get("transparency")
    if image.format == "PPM" and image.mode == "RGB" and max(_raw(image)[1:] or (0,)) > 255:
        notes.append("16-bit samples were cut to 8 bits")
    if deep is not None:
        channels = deep
    elif image.mode in DEEP_MODES:
        channels = _stretched(whole_levels(np.asarray(image)), image)[..., None]
        notes += ["floating-point samples became 16-bit levels"] if image.mode == "F" else []
    else:
        mode = {"1": "L", "La": "LA", "RGBa": "RGBA", "PA": "RGBA", "RGBX": "RGB"}.get(image.mode, image.mode)
        if mode == "P":
            mode, key = ("RGB", None) if key is None else ("RGBA", None)
        if mode not in ("L", "LA", "RGB", "RGBA"):
            notes.append(f"colour mode {mode} converted to RGB")
            mode, about["icc"] = "RGB", b""
        channels = np.array(image.convert(mode))
        channels = channels[..., None] if channels.ndim == 2 else channels
    if key is not None and channels.shape[-1] in (1, 3) and not isinstance(key, bytes):
        about["alpha"] = key_alpha(channels, key)
    return split_alpha(channels, **about)


def _stretched(levels: np.ndarray, image) -> np.ndarray:
    """Levels of 9 to 15 bits per sample, which Pillow hands out as they are, to 16 bits."""
    bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
    if not 8 < bits < 16:
        return levels
    return ((levels.astype(np.uint32) * 65535 + (1 << bits) // 2) // ((1 << bits) - 1)).astype(np.uint16)


def _raw(image) -> tuple:
    """Arguments of Pillow's decoder: the stored mode and its other options."""
    args = image.tile[0].args if getattr(image, "tile", None) else None
    return args if isinstance(args, tuple) else (args,)


def _deep_png(image) -> np.ndarray | None:
    """(y x c) uint16 of a 16-bit colour or grey-alpha PNG, which Pillow by itself would cut to 8 bits; otherwise None.

    Pillow's decoder takes the first byte of each big-endian sample for "16B" and the second for "16L", so
    reading twice gives both. Grey with alpha has as many bytes per pixel as RGBA and is read as that.
    """
    raw = _raw(image)[0] if image.format == "PNG" else None
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
    again._mode = mode  # private: Pillow has no public way to ask for the other byte of a sample
    again.tile = [t._replace(args=raw) for t in again.tile]
    return np.array(again)


def walk_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, through linked folders too (each once); hidden ones are left out."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(root, n) for n in names if not n.startswith(".")]
    return sorted(f for f in found if f.is_file())


def find_pictures(folder: str | Path) -> list[Path]:
    """All picture files below a folder, sorted by name; ImageError when there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ImageError(f"no folder at {folder}")
    files = [p for p in walk_files(folder) if p.suffix.lower() in SUFFIXES]
    if not files:
        raise ImageError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return files
