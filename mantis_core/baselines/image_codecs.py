"""Image codecs in front of the teacher: a file for every image, and its bytes without headers.

Sizes in bytes; images are uint8 (H, W, 3). No network, no accuracy.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

Pixels = NDArray[np.uint8]


class CodecError(ValueError):
    """This Pillow was built without a codec, or a file is not of the codec's format."""

    exit_code = 2


@dataclass(frozen=True)
class ImageCodec:
    """How Pillow writes one format. `coded_bytes` counts all bytes but container headers."""

    label: str
    format: str
    feature: str
    coded_bytes: Callable[[bytes], int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def require(self) -> None:
        """CodecError if this Pillow cannot write the format."""
        if not features.check(self.feature):
            raise CodecError(
                f"this Pillow was built without {self.label}; leave it out of evaluate.codecs, or "
                "install a Pillow wheel that has it"
            )

    def encode(self, image: Pixels, quality: int) -> bytes:
        """The file of `image`."""
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, self.format, quality=quality, **self.options)
        return stream.getvalue()

    def decode(self, data: bytes) -> Pixels:
        """The image in a file, (H, W, 3)."""
        with Image.open(io.BytesIO(data), formats=(self.format,)) as image:
            return np.asarray(image.convert("RGB"))


def coded_at(
    codec: ImageCodec, image: Pixels, quality: int, scale: float = 1.0
) -> tuple[bytes, Pixels]:
    """The file of an image (H, W, 3), and what a server makes of it, of the same size.

    With a `scale` below 1 the image is coded at that share of its sides and enlarged again.
    """
    height, width = image.shape[:2]
    if scale == 1:
        data = codec.encode(image, quality)
        return data, codec.decode(data)
    small = (max(1, round(scale * width)), max(1, round(scale * height)))
    reduced = Image.fromarray(image).resize(small, Image.Resampling.LANCZOS)
    data = codec.encode(np.asarray(reduced), quality)
    enlarged = Image.fromarray(codec.decode(data)).resize((width, height), Image.Resampling.BICUBIC)
    return data, np.asarray(enlarged)


def jpeg_scan_bytes(data: bytes) -> int:
    """Entropy-coded bytes of a JPEG: what follows the scan headers, up to the next marker."""
    total, position = 0, 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        length = int(struct.unpack_from(">H", data, position + 2)[0])
        position += 2 + length
        if marker != 0xDA:
            continue
        start = position
        # A marker is FF and neither the stuffed 00 nor a restart.
        while not (data[position] == 0xFF and data[position + 1] not in (0, *range(0xD0, 0xD8))):
            position += 1
        total += position - start
        if data[position + 1] == 0xD9:
            return total
    raise CodecError("a JPEG without an end of image")


def webp_frame_bytes(data: bytes) -> int:
    """Bytes of the VP8 or VP8L chunk of a WebP, without RIFF and frame headers."""
    position = 12
    while position + 8 <= len(data):
        kind, length = (
            data[position : position + 4],
            struct.unpack_from("<I", data, position + 4)[0],
        )
        if kind in (b"VP8 ", b"VP8L"):
            return int(length) - (10 if kind == b"VP8 " else 5)
        position += 8 + length + length % 2
    raise CodecError("a WebP without a picture")


def avif_media_bytes(data: bytes) -> int:
    """Bytes of the media data boxes of an AVIF."""
    return sum(length for kind, length in _boxes(data) if kind == b"mdat")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if length < 8:
            raise CodecError(f"an AVIF box of {length} bytes")
        yield kind, length - 8
        position += length


# The settings of a patient encoder: small files rather than fast ones.
IMAGE_CODECS: dict[str, ImageCodec] = {
    "jpeg": ImageCodec("JPEG", "JPEG", "jpg", jpeg_scan_bytes, {"optimize": True}),
    "webp": ImageCodec("WebP", "WEBP", "webp", webp_frame_bytes, {"method": 6}),
    "avif": ImageCodec("AVIF", "AVIF", "avif", avif_media_bytes, {"speed": 4}),
}
