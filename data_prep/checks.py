"""Cleans one encoded image or mask, or says why it is refused. Touches no files.

A clean image decodes in full, is RGB and upright and has the wanted short side. What can be
converted is converted (CMYK, grey, 16 bit, palette, alpha, EXIF rotation, a PNG called .JPEG); an
image that is clean already keeps its bytes. Truncated files are refused, never padded. The pixels
are those of `mantis_core/pixels.py`, with which a client reads its images too.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.errors import DataError
from mantis_core.pixels import (
    MAX_PIXELS,
    ImageError,
    check_pixels,
    decoding_reason,
    read_image,
    turned,
)

StoredFormat = Literal["webp", "jpeg"]

IGNORE = 255  # mask value that counts neither in a loss nor in a metric
KEPT_FORMATS = ("JPEG", "PNG")
STORED_FORMATS = (*KEPT_FORMATS, "WEBP")
LONGEST_SIDE = {"WEBP": 16383, "JPEG": 65500}  # px that the format can hold
ENCODINGS: dict[str, dict[str, Any]] = {
    "WEBP": {"lossless": True, "method": 0, "quality": 0},  # slower ones save 10% at most
    "JPEG": {"subsampling": "4:4:4"},
}


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
    data: bytes,
    *,
    short_side: int,
    max_pixels: float,
    stored_format: StoredFormat = "webp",
    jpeg_quality: int = 95,
) -> CleanImage | Rejection:
    """Checks one image and converts it where needed.

    A changed image is encoded as `stored_format`: lossless WebP, or JPEG of `jpeg_quality` with
    full colour. An image that is too long for the format becomes a PNG.
    """
    try:
        picture = read_image(data, short_side=short_side, max_pixels=max_pixels)
    except ImageError as error:
        return Rejection(str(error))
    image = picture.image
    kept = picture.untouched and picture.format in KEPT_FORMATS
    if not kept:
        kind = stored_format.upper()
        if max(image.size) > LONGEST_SIDE[kind]:
            kind = "PNG"
        options = {"quality": jpeg_quality} if kind == "JPEG" else {}
        data = _encoded(image, kind, options)
    return CleanImage(data, *image.size, not kept, picture.stored_size, picture.orientation)


def clean_mask(
    data: bytes,
    image: CleanImage,
    *,
    num_labels: int,
    ignored: tuple[int, ...],
    max_pixels: float = MAX_PIXELS,
) -> bytes | Rejection:
    """Aligns a mask with its cleaned image; returns a one-channel PNG.

    Its values are below `num_labels`, or 255. Returns a Rejection where the mask does not decode or
    fit the image. Raises DataError where it has colours or a value that is neither a label nor
    ignored, because a wrong list of labels spoils every mask.
    """
    labels = mask_values(data, max_pixels=max_pixels)
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
    stored, upright = image.stored_size, _upright_size(image)
    if clean.size == stored:
        clean = turned(clean, image.orientation)
    if clean.size != upright:
        return Rejection(f"mask of {clean.size} px does not fit its image of {stored} px")
    size = (image.width, image.height)
    return _encoded(clean.resize(size, Image.Resampling.NEAREST), "PNG", {})


def mask_values(data: bytes, *, max_pixels: float = MAX_PIXELS) -> NDArray[np.int64] | Rejection:
    """Returns the values of an encoded mask (H, W) as they are stored; of a palette, the indices.

    Returns a Rejection where it does not decode or has more than `max_pixels`. Raises DataError
    where it has colours.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as opened:
                check_pixels(opened.size, max_pixels)
                mode, values = opened.mode, np.asarray(opened)
    except ImageError as error:
        return Rejection(f"mask: {error}")
    except Exception as error:
        return Rejection(f"mask: {decoding_reason(error)}")
    if values.ndim != 2:
        raise DataError(f"a mask has mode {mode}; store masks with one channel of label values")
    return values.astype(np.int64)


def _upright_size(image: CleanImage) -> tuple[int, int]:
    width, height = image.stored_size
    return (height, width) if image.orientation >= 5 else (width, height)


def _encoded(image: Image.Image, kind: str, options: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **ENCODINGS.get(kind, {}), **options)
    return stream.getvalue()
