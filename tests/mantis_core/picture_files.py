"""Image files of every kind, made in code: what users have on their disks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

WIDTH, HEIGHT = 96, 72


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Gradients with noise, like a photograph of a noisy camera."""
    random = np.random.default_rng(0)
    x, y = np.linspace(0, 1, width)[None, :], np.linspace(0, 1, height)[:, None]
    colours = np.stack([x + 0 * y, y + 0 * x, 0.5 + 0.5 * np.sin(9 * (x + y))], axis=-1)
    noisy = 20 + 200 * colours + random.normal(0, 12, colours.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def grey() -> NDArray[np.uint8]:
    return np.asarray(photo().convert("L"))


def cut_out(mode: str = "RGBA") -> Image.Image:
    """The photo on a clear ground whose hidden pixels are black."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[12:60, 16:80] = 255
    alpha[12:60, 16:20] = 128
    hidden = Image.fromarray(np.where(alpha[..., None] > 0, np.asarray(photo()), np.uint8(0)))
    result = hidden.convert(mode)
    result.putalpha(Image.fromarray(alpha))
    return result


def on_white(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image.convert("RGBA"), float)
    alpha = pixels[..., 3:] / 255
    flat = pixels[..., :3] * alpha + 255 * (1 - alpha)
    return Image.fromarray(np.rint(flat).astype(np.uint8))


def turned_exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def deep_png(colours: NDArray[np.uint16]) -> bytes:
    """A PNG of (H, W, 3) with 16 bits a channel, which Pillow cannot write."""
    height, width, _ = colours.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in colours)

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def _sixteen(factor: float) -> Image.Image:
    return Image.fromarray(np.rint(grey() * factor).astype(np.uint16))


def _float(factor: float) -> bytes:
    return encoded(Image.fromarray(grey().astype(np.float32) * np.float32(factor)), "TIFF")


def _as_grey() -> Image.Image:
    return Image.fromarray(grey()).convert("RGB")


def _keyed() -> tuple[Image.Image, Image.Image]:
    """The photo with one colour that is transparent, and on white."""
    pixels = np.array(photo())
    pixels[10:30, 10:40] = (7, 7, 7)
    white = pixels.copy()
    white[10:30, 10:40] = 255
    return Image.fromarray(pixels), Image.fromarray(white)


def _brightest() -> NDArray[np.uint8]:
    """The grey photo with a white spot, so that its depth can be told."""
    levels = grey().copy()
    levels[:4, :4] = 255
    return levels


FILES: dict[str, Callable[[], tuple[bytes, Image.Image]]] = {
    "clear red": lambda: (
        encoded(Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0))),
        Image.new("RGB", (WIDTH, HEIGHT), "white"),
    ),
    "RGBA": lambda: (encoded(cut_out()), on_white(cut_out())),
    "WebP with alpha": lambda: (
        encoded(cut_out(), "WEBP", lossless=True, exact=True),
        on_white(cut_out()),
    ),
    "LA": lambda: (encoded(cut_out("L")), on_white(cut_out("L"))),
    "palette with transparency": lambda: (
        encoded(photo().quantize(16), transparency=3),
        on_white(Image.open(io.BytesIO(encoded(photo().quantize(16), transparency=3)))),
    ),
    "GIF": lambda: (encoded(photo().quantize(64), "GIF"), photo().quantize(64).convert("RGB")),
    "RGB with a transparent colour": lambda: (
        encoded(_keyed()[0], transparency=(7, 7, 7)),
        _keyed()[1],
    ),
    "RGB": lambda: (encoded(photo()), photo()),
    "L": lambda: (encoded(Image.fromarray(grey())), _as_grey()),
    "1": lambda: (encoded(photo().convert("1")), photo().convert("1").convert("RGB")),
    "CMYK": lambda: (
        encoded(photo().convert("CMYK"), "TIFF"),
        photo().convert("CMYK").convert("RGB"),
    ),
    "16-bit PNG": lambda: (encoded(_sixteen(257)), _as_grey()),
    "16-bit TIFF": lambda: (encoded(_sixteen(257), "TIFF"), _as_grey()),
    "16-bit ramp": lambda: (
        encoded(Image.fromarray(np.tile(np.arange(0, 65536, 683, np.uint16), (HEIGHT, 1)))),
        Image.fromarray(
            np.tile(np.rint(np.arange(0, 65536, 683) / 257).astype(np.uint8), (HEIGHT, 1))
        ).convert("RGB"),
    ),
    "16-bit PNG with a transparent level": lambda: (
        encoded(_sixteen(257), transparency=int(grey()[20, 20]) * 257),
        Image.fromarray(np.where(grey() == grey()[20, 20], np.uint8(255), grey())).convert("RGB"),
    ),
    "12 bits in a 16-bit PNG": lambda: (encoded(_sixteen(4095 / 255)), _as_grey()),
    "12 bits in a 16-bit TIFF": lambda: (encoded(_sixteen(4095 / 255), "TIFF"), _as_grey()),
    "8 bits in a 16-bit PNG": lambda: (encoded(_sixteen(1)), _as_grey()),
    "32-bit integer TIFF": lambda: (
        encoded(Image.fromarray(grey().astype(np.int32) * 257), "TIFF"),
        _as_grey(),
    ),
    "16-bit colour PNG": lambda: (
        deep_png(np.asarray(photo()).astype(np.uint16) * 257),
        photo(),
    ),
    "float TIFF of 0..1": lambda: (_float(1 / 255), _as_grey()),
    "float TIFF of 0..1 with overshoot": lambda: (
        encoded(Image.fromarray(_brightest().astype(np.float32) / 240), "TIFF"),
        Image.fromarray(
            np.rint(np.clip(_brightest() / 240.0, 0, 1) * 255).astype(np.uint8)
        ).convert("RGB"),
    ),
    "float TIFF of 0..255": lambda: (_float(1), _as_grey()),
    "float TIFF of 0..65535": lambda: (_float(257), _as_grey()),
    "JPEG at the stored size": lambda: _jpeg(photo(64, 64)),
    "turned JPEG": lambda: (
        encoded(photo(), "JPEG", quality=98, subsampling=0, exif=turned_exif(6)),
        photo().transpose(Image.Transpose.ROTATE_270),
    ),
    "turned TIFF": lambda: (
        encoded(photo(), "TIFF", exif=turned_exif(6)),
        photo().transpose(Image.Transpose.ROTATE_270),
    ),
    "mirrored PNG": lambda: (
        encoded(photo(), exif=turned_exif(7)),
        photo().transpose(Image.Transpose.TRANSVERSE),
    ),
    "large JPEG": lambda: _jpeg(photo(1001, 703)),
    "large progressive JPEG": lambda: _jpeg(photo(1001, 703), progressive=True),
    "large grey JPEG": lambda: _jpeg(photo(1001, 703).convert("L")),
    "thin": lambda: (encoded(photo(1, 60)), photo(1, 60)),
    "long": lambda: (encoded(photo(900, 3)), photo(900, 3)),
    "tiny": lambda: (encoded(photo(2, 2)), photo(2, 2)),
}
"""By name: makes a file, and the upright RGB image that it shows."""


def _jpeg(image: Image.Image, **options: Any) -> tuple[bytes, Image.Image]:
    return encoded(image, "JPEG", quality=98, subsampling=0, **options), image.convert("RGB")
