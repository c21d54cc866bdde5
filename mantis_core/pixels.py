"""From an image file to RGB pixels: one way for shards, evaluation, clients and served models.

Needs Pillow and numpy, never torch. It is the one module of mantis_core that data_prep imports:
a client must read a file as prepare did, or the codec sees other pixels than it was trained on.

H W pixels. Sizes of Pillow's images are (width, height), those of a codec are (height, width).
"""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 64e6
"""Default limit of an image as it is decoded and as it is resized, in pixels."""
UPRIGHT = 1  # EXIF
TURNS = {  # how an image of an EXIF orientation becomes upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITES = (255, 4095, 65535)  # of 8, 12 and 16 bits
OVERSHOOT = 2  # factor by which float values may pass their white


class ImageError(ValueError):
    """A file is no image, is damaged, or is larger than the limit."""

    exit_code = 2


@dataclass(frozen=True)
class Picture:
    """An upright RGB image of the wanted short side, and what its file was.

    `untouched` says that `image` has the pixels of the file as they are stored: RGB, upright,
    opaque and of this size.
    """

    image: Image.Image
    format: str | None  # Pillow's name, such as JPEG
    untouched: bool
    stored_size: tuple[int, int]  # width, height before EXIF rotation
    orientation: int  # EXIF, 1..8; 1 is upright


def read_pixels(
    data: bytes, image_size: tuple[int, int], short_side: int, *, max_pixels: float = MAX_PIXELS
) -> NDArray[np.uint8]:
    """An image file's bytes to what a codec of `image_size` (H, W) reads, uint8 (H, W, 3).

    These are the pixels of evaluation: resized to `short_side`, then the centre. Raises ImageError
    as `read_image` does.
    """
    picture = read_image(data, short_side=short_side, max_pixels=max_pixels)
    height, width = image_size
    image = cover(picture.image, image_size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def read_image(data: bytes, *, short_side: int, max_pixels: float = MAX_PIXELS) -> Picture:
    """An image file's bytes to an upright RGB image whose short side has `short_side` pixels.

    The first frame counts. What is transparent becomes white, and any bit depth becomes 8 bits. A
    large JPEG is first reduced by its decoder to no less than twice the wanted size, then by an
    antialiased bicubic filter. Raises ImageError for a file that does not decode in full, and for
    one of more than `max_pixels` as it is decoded or as it is resized.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(f"{type(data).__name__} is no image; give the bytes of an image file")
    if not data:
        raise ImageError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF and the like is judged here
        try:
            with Image.open(io.BytesIO(data)) as image:
                return _picture(image, short_side, max_pixels)
        except ImageError:
            raise
        except Exception as error:  # Pillow raises nearly any on a damaged file
            raise ImageError(decoding_reason(error)) from error


def cover(
    image: Image.Image,
    image_size: tuple[int, int],
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Enlarges an image smaller than (height, width), so that a crop of that size fits inside."""
    height, width = image_size
    scale = max(height / image.height, width / image.width)
    if scale <= 1:
        return image
    larger = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image.resize(larger, resampling)


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Returns an image of an EXIF orientation (1..8) upright."""
    return image if orientation == UPRIGHT else image.transpose(TURNS[orientation])


def check_pixels(size: tuple[int, int], max_pixels: float) -> None:
    """Raises ImageError for a (width, height) of more than `max_pixels`."""
    if size[0] * size[1] > max_pixels:
        raise ImageError(
            f"{size[0]} x {size[1]} is more than {max_pixels:.0f} pixels; shrink the image, or "
            "raise max_pixels"
        )


def decoding_reason(error: Exception) -> str:
    """Says in words for people why Pillow did not read a file."""
    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; shrink the image"
    if "truncated" in text.lower() or isinstance(error, EOFError):
        return "truncated"
    return f"does not decode ({type(error).__name__}: {text[:120]})"


def _picture(image: ImageFile.ImageFile, short_side: int, max_pixels: float) -> Picture:
    size, box = image.size, None
    if min(size) > 2 * short_side and not image.info.get("progressive"):
        # A progressive JPEG is held in full whatever size is asked for. Other formats ignore this.
        drafted = image.draft(None, (2 * short_side, 2 * short_side))
        box = drafted and drafted[1]
    check_pixels(image.size, max_pixels)
    scale = short_side / min(size)
    width, height = (max(short_side, round(side * scale)) for side in size)
    if width * height > max_pixels:
        raise ImageError(
            f"{size[0]} x {size[1]} is too long and thin: with a short side of {short_side} px it "
            f"has more than {max_pixels:.0f} pixels; cut the image"
        )
    deep = any(";16" in str(tile) for tile in image.tile)
    orientation = _orientation(image)
    image.load()
    left = _orientation(image)  # Pillow turns a TIFF itself
    stored = size if left == orientation or orientation < 5 else size[::-1]
    rgb = _rgb(image, deep=deep)
    untouched = (
        image.mode == "RGB"
        and not image.has_transparency_data
        and orientation == UPRIGHT
        and size == (width, height)
    )
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return Picture(turned(rgb, left), image.format, untouched, stored, orientation)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except (SyntaxError, ValueError, OSError, KeyError, TypeError, struct.error):
        return UPRIGHT  # the pixels of a damaged EXIF block are good
    return value if isinstance(value, int) and 1 <= value <= 8 else UPRIGHT


def _rgb(image: Image.Image, *, deep: bool) -> Image.Image:
    """RGB of any mode, transparency over white. `deep` says that the file has 16 bits a channel."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        levels = _eight_bits(values)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            levels[values == clear] = 255
        return Image.fromarray(levels).convert("RGB")
    if deep:
        _refuse_dim_colours(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    plain = image.convert("RGB")
    plain.info.clear()
    return plain


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey levels of any depth as 0..255.

    A file does not say how many of its bits are used, and 12-bit cameras write 16-bit files. So
    white is the top of the first of 8, 12 and 16 bits that holds the brightest pixel. For floats it
    may be 1.0 too, and resampled values may pass it by a factor of 2. What is no number is black.
    """
    floats = values.dtype.kind == "f"
    brightest = float(np.max(values, where=np.isfinite(values), initial=0))
    whites = (1, *WHITES) if floats else WHITES
    margin = OVERSHOOT if floats else 1
    larger = float(2 ** int(brightest).bit_length() - 1)
    white = next((white for white in whites if brightest <= margin * white), larger)
    levels = values.astype(np.float32)
    np.nan_to_num(levels, copy=False, nan=0, posinf=white, neginf=0)
    np.clip(levels, 0, white, out=levels)
    levels *= 255 / white
    return np.rint(levels, out=levels).astype(np.uint8)


def _refuse_dim_colours(image: Image.Image) -> None:
    """Raises ImageError for 12-bit colours in a 16-bit file: Pillow keeps the upper 8 of 16."""
    extrema: Any = image.getextrema()
    colours = 1 if image.mode == "LA" else 3
    brightest = max(high for _, high in extrema[:colours])
    clear = any(high == 0 for _, high in extrema[colours:])
    if brightest <= WHITES[1] >> 8 and not clear:
        raise ImageError(
            "16-bit colours of which none is over 4095, so nearly black; store the image with 8 "
            "bits a channel, or scale it to 65535"
        )
