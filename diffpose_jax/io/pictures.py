"""Reads pictures: files of any kind that a camera or a browser writes, to RGB as it is seen."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # of which phones have 108 megapixels; it takes 2 GB
MAX_SIDE_PX = 16_000  # squares are cut out of it, 1.2 times as wide
MIN_SIDE_PX = 16  # less shows no person

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".jp2", ".avif", ".ppm", ".pgm", ".pbm", ".heic", ".heif",
)  # fmt: skip
"""Endings of files that are taken for pictures in a folder; the last two then say what to do."""

# No others: Pillow would hand EPS to Ghostscript, for instance.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture cannot be read; the message names the file and says why."""


def read(path: str | os.PathLike[str], content: bytes | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Reads a picture as it is meant to be seen, from a file or from what a file would hold.

    The EXIF orientation is applied; transparent parts are put on white, as a browser shows them;
    of 16 bits the upper eight count; CMYK and palettes become RGB without a colour profile. Of an
    animation the first frame is read, and a warning says so.

    Raises:
      PictureError: if it is of another kind, damaged, too large (found before it is decoded) or
        too small.
    """
    with _opened(Path(path), content) as picture:
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            logging.warning("%s is animated: only its first frame is read", path)
        picture.load()
        rgb, orientation = _to_rgb(picture), None
        # Not `ImageOps.exif_transpose`: it writes the metadata anew, which fails for some cameras'.
        with contextlib.suppress(Exception):  # damaged metadata: the picture itself is there
            orientation = picture.getexif().get(ExifTags.Base.Orientation)
        return np.array(rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb)


def size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Tells width and height of a picture as it is stored, from its header; errors as of `read`."""
    with _opened(Path(path)) as picture:
        return picture.size


def focal_px(path: str | os.PathLike[str]) -> float | None:
    """The focal length that a camera wrote into its picture, in pixels; None without one.

    From `FocalLengthIn35mmFilm` of EXIF: that of the same diagonal angle on 36 x 24 mm. It does not
    hold for a picture that was cut afterwards. Errors as of `read`.
    """
    with _opened(Path(path)) as picture:
        length_mm = 0.0
        with contextlib.suppress(Exception):  # damaged metadata
            tags = picture.getexif().get_ifd(ExifTags.IFD.Exif)
            length_mm = float(tags.get(ExifTags.Base.FocalLengthIn35mmFilm, 0.0))
        diagonal_px = float(np.hypot(*picture.size))
        return length_mm / float(np.hypot(36.0, 24.0)) * diagonal_px if length_mm > 0 else None


def find(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder by their `SUFFIXES`, in order; raises PictureError if none is."""
    found = sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not found:
        raise PictureError(f"{folder} holds no pictures (files that end in .jpg, .png, ...)")
    return found


@contextlib.contextmanager
def _opened(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """Opens a picture of a good size; whatever goes wrong in the context is told of the file."""
    if content is None and not path.is_file():
        raise PictureError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]  # those that this Pillow has
    try:
        with warnings.catch_warnings():
            # Pillow warns of damaged metadata, which does not matter, and of half its own limit.
            warnings.simplefilter("ignore")
            source = path if content is None else io.BytesIO(content)
            with Image.open(source, formats=formats) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
                    raise Image.DecompressionBombError
                if min(width, height) < MIN_SIDE_PX:
                    least = f"too small to show a person (the least is {MIN_SIDE_PX} px)"
                    raise PictureError(f"has {width} x {height} px: {least}")
                yield picture
    except PictureError as error:
        raise PictureError(f"{path} {error}") from None
    except UnidentifiedImageError as error:
        raise PictureError(
            f"{path} is not a picture of a kind that can be read, or is damaged: take JPEG, PNG,"
            " WebP, GIF, BMP or TIFF (and convert HEIC to JPEG)"
        ) from error
    except Image.DecompressionBombError as error:
        raise PictureError(
            f"{path} has more than {MAX_PIXELS // 10**6} megapixels or {MAX_SIDE_PX:,} px to a"
            " side; scale it down or cut out the person"
        ) from error
    except Exception as error:  # for damaged files Pillow raises errors of many kinds
        raise PictureError(f"{path} cannot be read, it seems to be damaged: {error}") from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise PictureError("has floating-point pixels: nothing says which of them is white")
    if picture.mode.startswith("I"):
        # Pillow would clip 16 bits to 255 instead of scaling them.
        grey = np.clip(np.asarray(picture) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white
