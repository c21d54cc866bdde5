"""The container of coded images: header, body, checksum. No entropy coding, no task field.

Layout of format version 1, multi-byte fields big-endian:

    bytes         field
    2             magic AB 4D
    1             version (high 4 bits), flags (low 4 bits: 1 several, 2 levels, 4 shape, 8 rate)
    4             model id
    1..5          number of images as LEB128 varint                               (flag several)
    2..10         input height and width as LEB128 varints                        (flag shape)
    n             body: everything up to the checksum, one range-coded number that holds each
                  image's task field and latent
    4             CRC-32 (zlib) of everything before it

The shape is there only when it differs from the model's own, the number only from two images on,
and varints take as few bytes as they can: each content has exactly one byte string. Flag 8 is
reserved for a rate level. One image of the model's own shape: 11 bytes beside the body.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAGIC = b"\xab\x4d"
VERSION = 1
MAX_IMAGES = 256
MAX_TASKS = 256
_FLAG_NAMES = {1: "several", 2: "levels", 4: "shape", 8: "rate"}
_SEVERAL, _LEVELS, _SHAPE, _RATE = _FLAG_NAMES
_PREFIX_BYTES = 3
_ID_BYTES = 4
_HEADER_BYTES = _PREFIX_BYTES + _ID_BYTES
_CHECKSUM_BYTES = 4
_MAX_VARINT_BYTES = 5


class Reason(StrEnum):
    """Why a stream was refused."""

    NOT_A_STREAM = "not_a_stream"
    VERSION = "version"
    ANOTHER_MODEL = "another_model"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"


class BitstreamError(ValueError):
    """A stream that cannot be read or written; `reason` says why in a form a program can act on."""

    exit_code = 2

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class StreamSpec:
    """What client and server know before a stream is sent.

    `input_shape` is the model's own (H, W) in pixels, `stride` the downsampling from input to
    latent. `labels` are the tasks' numbers of labels, 0 where there is none to send, for a client
    that may answer an image itself; empty for one that may not. `max_pixels` of one image,
    `max_total_pixels` of all images of a stream and `max_stream_bytes` bound what a stream may make
    its reader allocate.
    """

    model_id: bytes
    num_tasks: int
    input_shape: tuple[int, int]
    latent_channels: int
    stride: int
    labels: tuple[int, ...] = ()
    max_pixels: int = 2**24
    max_total_pixels: int = 2**26
    max_stream_bytes: int = 2**24

    def __post_init__(self) -> None:
        if len(self.model_id) != _ID_BYTES:
            raise ValueError(f"model_id has {len(self.model_id)} bytes, must have {_ID_BYTES}")
        if not 1 <= self.num_tasks <= MAX_TASKS:
            raise ValueError(f"num_tasks is {self.num_tasks}, must be 1 to {MAX_TASKS}")
        if min(*self.input_shape, self.latent_channels, self.stride) < 1:
            raise ValueError("input_shape, latent_channels and stride must be at least 1")
        if self.labels and (len(self.labels) != self.num_tasks or min(self.labels) < 0):
            raise ValueError(f"labels {self.labels}: need one number, 0 or more, for each task")

    def latent_shape(self, input_shape: tuple[int, int]) -> tuple[int, int, int]:
        """The latent's (C, h, w) for an input of (H, W) pixels: sides / stride, rounded up."""
        height, width = input_shape
        return self.latent_channels, -(-height // self.stride), -(-width // self.stride)


@dataclass(frozen=True)
class Stream:
    """`num_images` coded images of one shape (H, W) in pixels.

    `with_levels`: whether the task fields in `body` hold probabilities.
    """

    num_images: int
    input_shape: tuple[int, int]
    with_levels: bool
    body: bytes


def pack(stream: Stream, spec: StreamSpec) -> bytes:
    """The byte string of `stream`. BitstreamError where `unpack` would refuse what it says."""
    _check(stream, spec)
    several, with_shape = stream.num_images > 1, stream.input_shape != spec.input_shape
    flags = _SEVERAL * several | _LEVELS * stream.with_levels | _SHAPE * with_shape
    data = bytearray(MAGIC)
    data.append(VERSION << 4 | flags)
    data += spec.model_id
    if several:
        data += _varint(stream.num_images)
    if with_shape:
        data += _varint(stream.input_shape[0]) + _varint(stream.input_shape[1])
    data += stream.body
    if len(data) + _CHECKSUM_BYTES > spec.max_stream_bytes:
        raise _too_many_bytes(len(data) + _CHECKSUM_BYTES, spec)
    return bytes(data) + zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big")


def unpack(data: bytes, spec: StreamSpec) -> Stream:
    """What `pack` was given, or BitstreamError. Allocates nothing but copies of parts of `data`.

    The checksum is verified before any field behind the version is believed. A stream that was cut
    short fails it too, so `truncated` is only said where not even a header is left.
    """
    if len(data) > spec.max_stream_bytes:
        raise _too_many_bytes(len(data), spec)
    flags = _read_prefix(data)
    _require_checksum(data)
    if flags & _RATE:
        raise BitstreamError(
            Reason.VERSION, "the stream carries a rate level, unknown to this version"
        )
    reader = _Reader(data[_PREFIX_BYTES:-_CHECKSUM_BYTES])
    model_id = reader.take(_ID_BYTES)
    if model_id != spec.model_id:
        raise BitstreamError(
            Reason.ANOTHER_MODEL,
            f"the stream was made by model {model_id.hex()}, this is model {spec.model_id.hex()}",
        )
    num_images = 1
    if flags & _SEVERAL:
        num_images = reader.varint()
        if num_images == 1:
            raise BitstreamError(Reason.CORRUPT, "a stream of one image says that it has several")
    shape = spec.input_shape
    if flags & _SHAPE:
        shape = (reader.varint(), reader.varint())
        if shape == spec.input_shape:
            raise BitstreamError(Reason.CORRUPT, "the model's own input shape is spelled out")
    stream = Stream(num_images, shape, bool(flags & _LEVELS), reader.rest())
    _check(stream, spec)
    return stream


def peek(data: bytes) -> dict[str, Any]:
    """What a stream says about itself without its model; `input_shape` None is the model's own.

    Raises BitstreamError if it is no stream of a known version or its checksum fails.
    """
    flags = _read_prefix(data)
    _require_checksum(data)
    reader = _Reader(data[_HEADER_BYTES:-_CHECKSUM_BYTES])
    num_images = reader.varint() if flags & _SEVERAL else 1
    shape = [reader.varint(), reader.varint()] if flags & _SHAPE else None
    return {
        "version": VERSION,
        "flags": [name for bit, name in _FLAG_NAMES.items() if flags & bit],
        "model_id": data[_PREFIX_BYTES:_HEADER_BYTES].hex(),
        "images": num_images,
        "input_shape": shape,
        "wire_bytes": len(data),
        "body_bytes": len(reader.rest()),
    }


class _Reader:
    """Takes fields off the front of a body that may end too early."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._position = 0

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._body):
            raise BitstreamError(Reason.TRUNCATED, "the stream ends within its header")
        field, self._position = self._body[self._position : end], end
        return field

    def varint(self) -> int:
        value = 0
        for i in range(_MAX_VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                if byte == 0 and i > 0:
                    raise BitstreamError(Reason.CORRUPT, "a number is written longer than needed")
                return value
        raise BitstreamError(Reason.TOO_LARGE, f"a number takes over {_MAX_VARINT_BYTES} bytes")

    def rest(self) -> bytes:
        return self.take(len(self._body) - self._position)


def _read_prefix(data: bytes) -> int:
    """The flags, once magic, version and least length are checked."""
    start = data[: len(MAGIC)]
    if start != MAGIC[: len(start)]:
        raise BitstreamError(
            Reason.NOT_A_STREAM, f"not a MANTiS stream: it begins with {start.hex()}"
        )
    if len(data) >= _PREFIX_BYTES and data[2] >> 4 != VERSION:
        raise BitstreamError(
            Reason.VERSION, f"the stream has format version {data[2] >> 4}, this reads {VERSION}"
        )
    least = _HEADER_BYTES + _CHECKSUM_BYTES
    if len(data) < least:
        raise BitstreamError(
            Reason.TRUNCATED, f"the stream has {len(data)} bytes, no stream has under {least}"
        )
    return data[2] & 0x0F


def _check(stream: Stream, spec: StreamSpec) -> None:
    """Holds what `pack` is given and what `unpack` found to the same rules."""
    height, width = stream.input_shape
    if stream.num_images < 1 or height < 1 or width < 1:
        raise BitstreamError(
            Reason.CORRUPT, f"{stream.num_images} images of {height}x{width} hold no pixel"
        )
    if height * width > spec.max_pixels:
        raise BitstreamError(
            Reason.TOO_LARGE, f"input of {height}x{width} is over {spec.max_pixels} pixels"
        )
    if stream.num_images > MAX_IMAGES:
        raise BitstreamError(
            Reason.TOO_LARGE, f"{stream.num_images} images are over {MAX_IMAGES} a stream"
        )
    if stream.num_images * height * width > spec.max_total_pixels:
        raise BitstreamError(
            Reason.TOO_LARGE,
            f"{stream.num_images} images of {height}x{width} are over {spec.max_total_pixels} "
            "pixels a stream",
        )


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _require_checksum(data: bytes) -> None:
    stored = int.from_bytes(data[-_CHECKSUM_BYTES:], "big")
    if zlib.crc32(data[:-_CHECKSUM_BYTES]) != stored:
        raise BitstreamError(
            Reason.CORRUPT,
            f"the checksum of this {len(data)}-byte stream fails: damaged or cut short",
        )


def _too_many_bytes(count: int, spec: StreamSpec) -> BitstreamError:
    return BitstreamError(
        Reason.TOO_LARGE, f"a stream of {count} bytes is over {spec.max_stream_bytes}"
    )
