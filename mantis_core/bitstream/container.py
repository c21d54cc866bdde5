"""The container of coded images: header, body, checksum. No entropy coding, no task field.

Layout of format versions 1 and 2, multi-byte fields big-endian:

    bytes         field
    2             magic AB 4D
    1             version (high 4 bits), flags (low 4 bits: 1 several, 2 levels, 4 shape,
                  8 in version 1 reserved, in version 2 answers)
    4             id: of the model in version 1, of what decides a stream in version 2
    1..5          number of images as LEB128 varint                               (flag several)
    2..10         input height and width as LEB128 varints                        (flag shape)
    n             body: everything up to the checksum, one range-coded number that holds each
                  image's task field and latent
    4             CRC-32 (zlib) of everything before it

The shape is there only when it differs from the model's own, the number only from two images on,
and varints take as few bytes as they can: each header has exactly one byte string. One image of the
model's own shape: 11 bytes beside the body. `session.py` has a form with 2.

A model writes and reads one version. Its rate levels, from version 2 on, are coded in the body.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAGIC = b"\xab\x4d"
HELLO_MAGIC = b"\xab\x53"
VERSIONS = (1, 2)
MAX_IMAGES = 256
MAX_TASKS = 256
MAX_RATE_LEVELS = 256
CONFIDENCE_LEVELS = 8
CONFIDENCE_ROWS = 17
"""One for each level of the primary task, and the last for streams without levels."""
SEVERAL, LEVELS, SHAPE, LAST_FLAG = 1, 2, 4, 8
_FLAG_NAMES = {
    version: {SEVERAL: "several", LEVELS: "levels", SHAPE: "shape", LAST_FLAG: last}
    for version, last in zip(VERSIONS, ("rate", "answers"), strict=True)
}
_PREFIX_BYTES = 3
_ID_BYTES = 4
_HEADER_BYTES = _PREFIX_BYTES + _ID_BYTES
ID_PLACE = slice(_PREFIX_BYTES, _HEADER_BYTES)
"""Where a stream or a hello holds its id. Nothing is known to be right there yet."""
_CHECKSUM_BYTES = 4
_MAX_VARINT_BYTES = 5
OVERHEAD_BYTES = _HEADER_BYTES + _CHECKSUM_BYTES
"""What a stream of one image, of the model's own shape, takes beside its body."""


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
    that names labels; empty for one that does not. `max_pixels` of one image, `max_total_pixels` of
    all images of a stream and `max_stream_bytes` bound what a stream may make its reader allocate.

    Of version 2 alone: `rate_levels` is how many rates the model has. `confidence` holds the counts
    out of 2**16 of the levels of confidence that the client has in its own label, a row for each
    level of the primary task and one for streams without levels: (17, 8). With it, each image
    carries the client's label and that level; without it, ().
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
    version: int = 1
    rate_levels: int = 1
    confidence: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.model_id) != _ID_BYTES:
            raise ValueError(f"model_id has {len(self.model_id)} bytes, must have {_ID_BYTES}")
        if not 1 <= self.num_tasks <= MAX_TASKS:
            raise ValueError(f"num_tasks is {self.num_tasks}, must be 1 to {MAX_TASKS}")
        if min(*self.input_shape, self.latent_channels, self.stride) < 1:
            raise ValueError("input_shape, latent_channels and stride must be at least 1")
        if self.labels and (len(self.labels) != self.num_tasks or min(self.labels) < 0):
            raise ValueError(f"labels {self.labels}: need one number, 0 or more, for each task")
        if self.version not in VERSIONS:
            raise ValueError(f"version is {self.version}, must be one of {VERSIONS}")
        if not 1 <= self.rate_levels <= MAX_RATE_LEVELS:
            raise ValueError(f"rate_levels is {self.rate_levels}, must be 1 to {MAX_RATE_LEVELS}")
        if self.version == 1 and (self.rate_levels > 1 or self.confidence):
            raise ValueError("rate_levels and confidence need version 2")
        if self.confidence and not self.labels:
            raise ValueError("confidence needs labels")
        rows = {len(row) for row in self.confidence}
        if self.confidence and (
            (len(self.confidence), rows) != (CONFIDENCE_ROWS, {CONFIDENCE_LEVELS})
            or any(min(row) < 1 or sum(row) != 1 << 16 for row in self.confidence)
        ):
            raise ValueError(
                f"confidence must be {CONFIDENCE_ROWS} rows of {CONFIDENCE_LEVELS} counts, each at "
                f"least 1, that sum to {1 << 16}"
            )

    def latent_shape(self, input_shape: tuple[int, int]) -> tuple[int, int, int]:
        """The latent's (C, h, w) for an input of (H, W) pixels: sides / stride, rounded up."""
        height, width = input_shape
        return self.latent_channels, -(-height // self.stride), -(-width // self.stride)


@dataclass(frozen=True)
class Stream:
    """`num_images` coded images of one shape (H, W) in pixels.

    `with_levels`: whether the task fields in `body` hold probabilities. `with_answers`: whether
    each image carries the client's own label, with or without a latent.
    """

    num_images: int
    input_shape: tuple[int, int]
    with_levels: bool
    body: bytes
    with_answers: bool = False


def pack(stream: Stream, spec: StreamSpec) -> bytes:
    """The byte string of `stream`. BitstreamError where `unpack` would refuse what it says."""
    _check(stream, spec)
    several, with_shape = stream.num_images > 1, stream.input_shape != spec.input_shape
    flags = SEVERAL * several | LEVELS * stream.with_levels | SHAPE * with_shape
    flags |= LAST_FLAG * stream.with_answers
    data = bytearray(MAGIC)
    data.append(spec.version << 4 | flags)
    data += spec.model_id
    if several:
        data += varint(stream.num_images)
    if with_shape:
        data += varint(stream.input_shape[0]) + varint(stream.input_shape[1])
    data += stream.body
    if len(data) + _CHECKSUM_BYTES > spec.max_stream_bytes:
        raise too_many_bytes(len(data) + _CHECKSUM_BYTES, spec)
    return sealed(bytes(data))


def unpack(data: bytes, spec: StreamSpec) -> Stream:
    """What `pack` was given, or BitstreamError. Allocates nothing but copies of parts of `data`.

    The checksum is verified before any field behind the version is believed. A stream that was cut
    short fails it too, so `truncated` is only said where not even a header is left.
    """
    if len(data) > spec.max_stream_bytes:
        raise too_many_bytes(len(data), spec)
    version, flags = read_prefix(data, MAGIC)
    reader = opened(data, version, spec)
    if version == 1 and flags & LAST_FLAG:
        raise BitstreamError(
            Reason.VERSION, "the stream carries a rate level, unknown to this version"
        )
    num_images = 1
    if flags & SEVERAL:
        num_images = reader.varint()
        if num_images == 1:
            raise BitstreamError(Reason.CORRUPT, "a stream of one image says that it has several")
    shape = reader.shape(spec) if flags & SHAPE else spec.input_shape
    stream = Stream(num_images, shape, bool(flags & LEVELS), reader.rest(), bool(flags & LAST_FLAG))
    _check(stream, spec)
    return stream


def peek(data: bytes) -> dict[str, Any]:
    """What a stream says about itself without its model; `input_shape` None is the model's own.

    Raises BitstreamError if it is no stream of a known version or its checksum fails.
    """
    version, flags = read_prefix(data, MAGIC)
    _require_checksum(data)
    reader = Reader(data[_HEADER_BYTES:-_CHECKSUM_BYTES])
    num_images = reader.varint() if flags & SEVERAL else 1
    shape = [reader.varint(), reader.varint()] if flags & SHAPE else None
    return {
        "version": version,
        "flags": [name for bit, name in _FLAG_NAMES[version].items() if flags & bit],
        "stream_id": data[_PREFIX_BYTES:_HEADER_BYTES].hex(),
        "images": num_images,
        "input_shape": shape,
        "wire_bytes": len(data),
        "body_bytes": len(reader.rest()),
    }


def peek_hello(data: bytes) -> str:
    """The id that the hello of a session names, in hexadecimal digits, without its model.

    Raises BitstreamError if it is no hello of a known version or its checksum fails.
    """
    read_prefix(data, HELLO_MAGIC)
    _require_checksum(data)
    return data[_PREFIX_BYTES:_HEADER_BYTES].hex()


class Reader:
    """Takes fields off the front of a header that may end too early."""

    def __init__(self, fields: bytes) -> None:
        self._fields = fields
        self._position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self._position + count
        if end > len(self._fields):
            raise BitstreamError(Reason.TRUNCATED, "the stream ends within its header")
        field, self._position = self._fields[self._position : end], end
        return field

    def varint(self) -> int:
        """A number as LEB128, refused if it is longer than it must be."""
        value = 0
        for i in range(_MAX_VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                if byte == 0 and i > 0:
                    raise BitstreamError(Reason.CORRUPT, "a number is written longer than needed")
                return value
        raise BitstreamError(Reason.TOO_LARGE, f"a number takes over {_MAX_VARINT_BYTES} bytes")

    def shape(self, spec: StreamSpec) -> tuple[int, int]:
        """Height and width of an input that has not the model's own."""
        shape = (self.varint(), self.varint())
        if shape == spec.input_shape:
            raise BitstreamError(Reason.CORRUPT, "the model's own input shape is spelled out")
        return shape

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._fields) - self._position)


def read_prefix(data: bytes, magic: bytes) -> tuple[int, int]:
    """Version and flags, once magic, version and least length are checked."""
    start = bytes(data[: len(magic)])
    if start != magic[: len(start)]:
        kinds = {MAGIC: "a file or stream", HELLO_MAGIC: "the hello of a session"}
        found = f"it is {kinds[start]}" if start in kinds else f"it begins with {start.hex()}"
        raise BitstreamError(
            Reason.NOT_A_STREAM,
            f"not {'a MANTiS stream' if magic == MAGIC else kinds[magic]}: {found}",
        )
    if len(data) >= _PREFIX_BYTES and data[2] >> 4 not in VERSIONS:
        raise BitstreamError(
            Reason.VERSION,
            f"the stream has format version {data[2] >> 4}, this reads {VERSIONS[0]} to "
            f"{VERSIONS[-1]}",
        )
    least = _HEADER_BYTES + _CHECKSUM_BYTES
    if len(data) < least:
        raise BitstreamError(
            Reason.TRUNCATED, f"the stream has {len(data)} bytes, no stream has under {least}"
        )
    return data[2] >> 4, data[2] & 0x0F


def opened(data: bytes, version: int, spec: StreamSpec) -> Reader:
    """A reader of what stands behind the id, once checksum, version and id are right."""
    _require_checksum(data)
    if version != spec.version:
        raise BitstreamError(
            Reason.VERSION,
            f"the stream has format version {version}, this model has version {spec.version}",
        )
    reader = Reader(data[_PREFIX_BYTES:-_CHECKSUM_BYTES])
    model_id = reader.take(_ID_BYTES)
    if model_id != spec.model_id:
        raise BitstreamError(
            Reason.ANOTHER_MODEL,
            f"the stream was made by model {model_id.hex()}, this is model {spec.model_id.hex()}: "
            "decode it with the version of the model that its client has, or with a later one that "
            "was made of it",
        )
    return reader


def sealed(data: bytes) -> bytes:
    """`data` with its checksum behind it."""
    return data + zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big")


def _check(stream: Stream, spec: StreamSpec) -> None:
    """Holds what `pack` is given and what `unpack` found to the same rules."""
    check_shape(stream.input_shape, stream.num_images, spec)
    if stream.with_answers and not spec.confidence:
        raise BitstreamError(
            Reason.CORRUPT, "the stream carries answers of a client that sends none"
        )


def check_shape(shape: tuple[int, int], num_images: int, spec: StreamSpec) -> None:
    """BitstreamError for images of `shape` (H, W) that a stream may not hold."""
    height, width = shape
    if num_images < 1 or height < 1 or width < 1:
        raise BitstreamError(
            Reason.CORRUPT, f"{num_images} images of {height}x{width} hold no pixel"
        )
    if height * width > spec.max_pixels:
        raise BitstreamError(
            Reason.TOO_LARGE, f"input of {height}x{width} is over {spec.max_pixels} pixels"
        )
    if num_images > MAX_IMAGES:
        raise BitstreamError(
            Reason.TOO_LARGE, f"{num_images} images are over {MAX_IMAGES} a stream"
        )
    if num_images * height * width > spec.max_total_pixels:
        raise BitstreamError(
            Reason.TOO_LARGE,
            f"{num_images} images of {height}x{width} are over {spec.max_total_pixels} "
            "pixels a stream",
        )


def varint(value: int) -> bytes:
    """A number from 0 as LEB128, in the fewest bytes."""
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


def too_many_bytes(count: int, spec: StreamSpec) -> BitstreamError:
    """What is raised for a stream of so many bytes."""
    return BitstreamError(
        Reason.TOO_LARGE, f"a stream of {count} bytes is over {spec.max_stream_bytes}"
    )
