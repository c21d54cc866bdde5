"""The container of a coded image: header, task field, payload, checksum. No entropy coding.

Layout of format version 1, multi-byte fields big-endian:

    bytes         field
    2             magic AB 4D
    1             version (high 4 bits), flags (low 4 bits: 1 primary, 2 levels, 4 shape, 8 rate)
    4             model id
    ceil(K / 8)   task mask: bit k % 8 of byte k // 8 is task k
    1             index of the primary task, an active one                        (flag primary)
    ceil(A / 2)   a 4-bit level for each of the A active tasks, low half first    (flag levels)
    2..10         input height and width as LEB128 varints                        (flag shape)
    n             payload: everything up to the checksum
    4             CRC-32 (zlib) of everything before it

Unused bits are zero, the shape is there only when it differs from the model's own, and varints take
as few bytes as they can: each content has exactly one byte string. Flag 8 is reserved for a rate
level. Mask only, own shape: 12 bytes up to 8 tasks, 13 up to 16.
"""

import math
import zlib
from dataclasses import dataclass
from enum import StrEnum

MAGIC = b"\xab\x4d"
VERSION = 1
MAX_LEVEL = 15

_FLAG_NAMES = {1: "primary", 2: "levels", 4: "shape", 8: "rate"}
_PRIMARY, _LEVELS, _SHAPE, _RATE = _FLAG_NAMES
_PREFIX_BYTES = 3
_ID_BYTES = 4
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

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class StreamSpec:
    """What client and server know before a stream is sent.

    `input_shape` is the model's own (H, W) in pixels, `stride` the downsampling from input to
    latent, `max_pixels` and `max_stream_bytes` bound what a stream may make its reader allocate.
    """

    model_id: bytes
    num_tasks: int
    input_shape: tuple[int, int]
    latent_channels: int
    stride: int
    max_pixels: int = 2**24
    max_stream_bytes: int = 2**24

    def __post_init__(self) -> None:
        if len(self.model_id) != _ID_BYTES:
            raise ValueError(f"model_id has {len(self.model_id)} bytes, must have {_ID_BYTES}")
        if not 1 <= self.num_tasks <= 256:
            raise ValueError(f"num_tasks is {self.num_tasks}, must be 1 to 256")
        if min(*self.input_shape, self.latent_channels, self.stride) < 1:
            raise ValueError("input_shape, latent_channels and stride must be at least 1")

    def latent_shape(self, input_shape: tuple[int, int]) -> tuple[int, int, int]:
        """The latent's (C, h, w) for an input of (H, W) pixels: sides / stride, rounded up."""
        height, width = input_shape
        return self.latent_channels, -(-height // self.stride), -(-width // self.stride)


@dataclass(frozen=True)
class Stream:
    """One coded image.

    `mask` holds K booleans, at least one of them true. `primary` is the index of the most probable
    active task, where the prior needs it. `log2_levels` holds one level (see `quantise_log2`) per
    active task, in the order of the tasks. `input_shape` is (H, W) in pixels.
    """

    mask: tuple[bool, ...]
    primary: int | None
    log2_levels: tuple[int, ...] | None
    input_shape: tuple[int, int]
    payload: bytes


def pack(stream: Stream, spec: StreamSpec) -> bytes:
    """The byte string of `stream`. BitstreamError where `unpack` would refuse what it says."""
    _check(stream, spec)
    with_shape = stream.input_shape != spec.input_shape
    flags = (
        _PRIMARY * (stream.primary is not None)
        | _LEVELS * (stream.log2_levels is not None)
        | _SHAPE * with_shape
    )
    body = bytearray(MAGIC)
    body.append(VERSION << 4 | flags)
    body += spec.model_id
    mask_bits = sum(1 << task for task, active in enumerate(stream.mask) if active)
    body += mask_bits.to_bytes(_mask_bytes(spec), "little")
    if stream.primary is not None:
        body.append(stream.primary)
    if stream.log2_levels is not None:
        level_bits = sum(level << 4 * i for i, level in enumerate(stream.log2_levels))
        body += level_bits.to_bytes((len(stream.log2_levels) + 1) // 2, "little")
    if with_shape:
        body += _varint(stream.input_shape[0]) + _varint(stream.input_shape[1])
    body += stream.payload
    if len(body) + _CHECKSUM_BYTES > spec.max_stream_bytes:
        raise _too_many_bytes(len(body) + _CHECKSUM_BYTES, spec)
    return bytes(body) + zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "big")


def unpack(data: bytes, spec: StreamSpec) -> Stream:
    """What `pack` was given, or BitstreamError. Allocates nothing but copies of parts of `data`.

    The checksum is verified before any field behind the version is believed. A stream that was cut
    short fails it too, so `truncated` is only said where not even a header is left.
    """
    if len(data) > spec.max_stream_bytes:
        raise _too_many_bytes(len(data), spec)
    flags = _read_prefix(data)
    if not _checksum_holds(data):
        raise BitstreamError(
            Reason.CORRUPT,
            f"the checksum of this {len(data)}-byte stream fails: damaged or cut short",
        )
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
    mask = _bits(reader.take(_mask_bytes(spec)), spec.num_tasks)
    primary = reader.take(1)[0] if flags & _PRIMARY else None
    levels = _nibbles(reader, sum(mask)) if flags & _LEVELS else None
    shape = spec.input_shape
    if flags & _SHAPE:
        shape = (reader.varint(), reader.varint())
        if shape == spec.input_shape:
            raise BitstreamError(Reason.CORRUPT, "the model's own input shape is spelled out")
    stream = Stream(mask, primary, levels, shape, reader.rest())
    _check(stream, spec)
    return stream


def peek(data: bytes) -> dict[str, object]:
    """What a stream says about itself without its model: version, flags, model id, sizes, checksum.

    Raises BitstreamError if it is no stream of a known version; a failed checksum is only reported.
    """
    flags = _read_prefix(data)
    header_bytes = _PREFIX_BYTES + _ID_BYTES
    return {
        "version": VERSION,
        "flags": [name for bit, name in _FLAG_NAMES.items() if flags & bit],
        "model_id": data[_PREFIX_BYTES:header_bytes].hex(),
        "wire_bytes": len(data),
        "task_field_and_payload_bytes": len(data) - header_bytes - _CHECKSUM_BYTES,
        "checksum_ok": _checksum_holds(data),
    }


def quantise_log2(probability: float) -> int:
    """The level 0..15 nearest to -2 log2(probability): half-bit steps from 1 to 2**-7.5."""
    if math.isnan(probability):
        raise ValueError("a task probability is NaN")
    if probability <= 2.0 ** (-MAX_LEVEL / 2):
        return MAX_LEVEL
    return max(0, round(-2 * math.log2(probability)))


def dequantise_level(level: int) -> float:
    """The probability 2**(-level / 2) that a level stands for."""
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"level is {level}, must be 0 to {MAX_LEVEL}")
    return float(2.0 ** (-level / 2))


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
    least = _PREFIX_BYTES + _ID_BYTES + 1 + _CHECKSUM_BYTES
    if len(data) < least:
        raise BitstreamError(
            Reason.TRUNCATED, f"the stream has {len(data)} bytes, no stream has under {least}"
        )
    return data[2] & 0x0F


def _check(stream: Stream, spec: StreamSpec) -> None:
    """Holds what `pack` is given and what `unpack` found to the same rules."""
    height, width = stream.input_shape
    active = sum(stream.mask)
    if height * width > spec.max_pixels:
        raise BitstreamError(
            Reason.TOO_LARGE, f"input of {height}x{width} is over {spec.max_pixels} pixels"
        )
    if height < 1 or width < 1:
        raise BitstreamError(Reason.CORRUPT, f"input of {height}x{width} holds no pixel")
    if len(stream.mask) != spec.num_tasks or not active:
        raise BitstreamError(
            Reason.CORRUPT,
            f"{active} active of {len(stream.mask)} tasks, must be at least 1 of {spec.num_tasks}",
        )
    if stream.primary is not None and not (
        0 <= stream.primary < spec.num_tasks and stream.mask[stream.primary]
    ):
        raise BitstreamError(Reason.CORRUPT, f"primary task {stream.primary} is not active")
    levels = stream.log2_levels
    if levels is not None and (
        len(levels) != active or not all(0 <= level <= MAX_LEVEL for level in levels)
    ):
        raise BitstreamError(
            Reason.CORRUPT,
            f"levels {levels}: need one of 0 to {MAX_LEVEL} for each of {active} tasks",
        )


def _mask_bytes(spec: StreamSpec) -> int:
    return (spec.num_tasks + 7) // 8


def _bits(field: bytes, count: int) -> tuple[bool, ...]:
    bits = int.from_bytes(field, "little")
    if bits >> count:
        raise BitstreamError(Reason.CORRUPT, f"the mask names a task beyond the model's {count}")
    return tuple(bool(bits >> k & 1) for k in range(count))


def _nibbles(reader: _Reader, count: int) -> tuple[int, ...]:
    bits = int.from_bytes(reader.take((count + 1) // 2), "little")
    if bits >> 4 * count:
        raise BitstreamError(Reason.CORRUPT, "an unused half byte is not zero")
    return tuple(bits >> 4 * i & 0x0F for i in range(count))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _checksum_holds(data: bytes) -> bool:
    stored = int.from_bytes(data[-_CHECKSUM_BYTES:], "big")
    return zlib.crc32(data[:-_CHECKSUM_BYTES]) == stored


def _too_many_bytes(count: int, spec: StreamSpec) -> BitstreamError:
    return BitstreamError(
        Reason.TOO_LARGE, f"a stream of {count} bytes is over {spec.max_stream_bytes}"
    )
