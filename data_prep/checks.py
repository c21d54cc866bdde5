"""Cleans one encoded image or mask, or says why it is refused. Touches no files.

A clean image decodes in full, is RGB and upright and has the wanted short side. What can be
converted is converted (CMYK, grey, 16 bit, palette, alpha, EXIF rotation, a PNG called .JPEG); an
image that is clean already keeps its bytes. Truncated files are refused, never padded.
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_prep.errors import DataError

IGNORE = 255  # mask value that counts neither in a loss nor in a metric
KEPT_FORMATS = ("JPEG", "PNG")
UPRIGHT = 1


@dataclass(frozen=True)
class CleanImage:
    """An image as it is stored in a shard.

    `stored_size` and `orientation` are those of the bytes that came in: a mask is aligned by them.
    """

    data: bytes
    width: int
    height: int
    changed: bool
    stored_size: tuple[int, int]  # width, height before EXIF rotation
    orientation: int  # EXIF, 1..8; 1 is upright


@dataclass(frozen=True)
class Rejection:
    """Why an image or a mask was refused; listed in rejected.parquet."""

    reason: str


def clean_image(
    data: bytes, *, short_side: int, jpeg_quality: int, max_pixels: float, lossless: bool = False
) -> CleanImage | Rejection:
    """Checks one image and converts it where needed.

    With `lossless` a changed image is encoded as PNG instead of JPEG (images with masks). A large
    JPEG is first reduced by the decoder to no less than twice the wanted size, then by an
    antialiased bicubic filter.
    """
    if not data:
        return Rejection("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and the like is judged here
        try:
            with Image.open(io.BytesIO(data)) as image:
                return _cleaned(data, image, short_side, jpeg_quality, max_pixels, lossless)
        except UnidentifiedImageError:
            return Rejection("not an image")
        except Image.DecompressionBombError:
            return Rejection(f"more than {max_pixels:.0f} pixels")
        except Exception as error:
            return Rejection(_decoding_reason(error))


def clean_mask(
    data: bytes, image: CleanImage, *, num_labels: int, ignored: tuple[int, ...]
) -> bytes | Rejection:
    """Aligns a mask with its cleaned image; returns a one-channel PNG.

    Its values are below `num_labels`, or 255. Returns a Rejection where the mask does not decode or
    fit the image. Raises DataError where it has colours or a value that is neither a label nor
    ignored, because a wrong list of labels spoils every mask.
    """
    labels = mask_values(data)
    if isinstance(labels, Rejection):
        return labels
    labels[np.isin(labels, ignored)] = IGNORE
    wrong = labels[(labels != IGNORE) & ((labels < 0) | (labels >= num_labels))]
    if wrong.size:
        raise DataError(
            f"mask value {int(wrong.max())} is outside its labels 0..{num_labels - 1}; "
            "add labels to the task, or add the value to its `ignore`"
        )
    clean = Image.fromarray(labels.astype(np.uint8))
    if clean.size == image.stored_size and image.orientation != UPRIGHT:
        clean.getexif()[ExifTags.Base.Orientation] = image.orientation
        clean = ImageOps.exif_transpose(clean)
        upright = clean.size
    else:
        upright = _upright_size(image)
    if clean.size != upright:
        return Rejection(
            f"mask of {clean.size} px does not fit its image of {image.stored_size} px"
        )
    size = (image.width, image.height)
    return _encoded(clean.resize(size, Image.Resampling.NEAREST), "PNG", {})


def mask_values(data: bytes) -> NDArray[np.int64] | Rejection:
    """Returns the values of an encoded mask (H, W) as they are stored; of a palette, the indices.

    Returns a Rejection where it does not decode. Raises DataError where it has colours.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            mode, values = opened.mode, np.asarray(opened)
    except Exception as error:
        return Rejection(f"mask: {_decoding_reason(error)}")
    if values.ndim != 2:
        raise DataError(f"a mask has mode {mode}; store masks with one channel of label values")
    return values.astype(np.int64)


def _cleaned(
    data: bytes,
    image: Image.Image,
    short_side: int,
    jpeg_quality: int,
    max_pixels: float,
    lossless: bool,
) -> CleanImage | Rejection:
    stored, orientation = image.size, _orientation(image)
    if stored[0] * stored[1] > max_pixels:
        return Rejection(f"{stored[0]} x {stored[1]} is more than {max_pixels:.0f} pixels")
    keep = image.format in KEPT_FORMATS and image.mode == "RGB" and orientation == UPRIGHT
    if min(stored) > 2 * short_side:
        image.draft(None, (2 * short_side, 2 * short_side))
    image.load()
    if keep and min(stored) == short_side:
        return CleanImage(data, *stored, False, stored, orientation)
    rgb = _rgb(image)
    if orientation != UPRIGHT:
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        rgb = ImageOps.exif_transpose(rgb)
    scale = short_side / min(stored)
    turned = orientation >= 5
    width, height = (
        max(short_side, round(side * scale)) for side in (stored[::-1] if turned else stored)
    )
    if width * height > max_pixels:
        return Rejection(f"{stored[0]} x {stored[1]} is too long and thin")
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    options = {} if lossless else {"quality": jpeg_quality}
    encoded = _encoded(rgb, "PNG" if lossless else "JPEG", options)
    return CleanImage(encoded, width, height, True, stored, orientation)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except (SyntaxError, ValueError, OSError, KeyError, TypeError, struct.error):
        return UPRIGHT  # the pixels of a damaged EXIF block are good
    return value if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def _upright_size(image: CleanImage) -> tuple[int, int]:
    width, height = image.stored_size
    return (height, width) if image.orientation >= 5 else (width, height)


def _rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode: high bit depths scaled down, transparency over white."""
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if "A" in image.mode or "transparency" in image.info:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    plain = image.convert("RGB")
    plain.info.clear()
    return plain


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Grey levels of a 16- or 32-bit image as 0..255."""
    levels = values.astype(np.float64)
    if values.dtype == np.uint16 or levels.max() > 255:
        levels = levels / 257.0  # 65535 is white
    return np.clip(np.rint(levels), 0, 255).astype(np.uint8)


def _encoded(image: Image.Image, kind: str, options: dict[str, int]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _decoding_reason(error: Exception) -> str:
    text = str(error)
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    return f"does not decode ({type(error).__name__}: {text[:120]})"
