"""Sessions: what two ends agree on once, so that an image costs its body and two bytes.

A client opens a session with a hello. Each message of it then holds one image. Multi-byte fields
are big-endian.

    bytes         field of a hello
    2             magic AB 53
    1             version, 2 (high 4 bits), flags (low 4 bits: 1 requests, 2 levels, 4 shape,
                  8 answers)
    4             id of what decides a stream
    2..10         input height and width as LEB128 varints                        (flag shape)
    4             CRC-32 (zlib) of everything before it

    bytes         field of a message
    n             body: as that of a stream of one image
    2             CRC-16 (GENIBUS: polynomial 1021, start and final XOR FFFF) over 4 bytes that
                  stand for hello and request, and the body

The 4 bytes are the first of a SHA-256 over the hello and, in a session of requests, the tasks that
were asked for, one byte 0 or 1 each. Every message of such a session replies to those tasks, and
carries no task field. A message of another session, or a reply to another request, fails its
checksum, but for one pair of them in 65,536. Of damaged messages one in 65,536 passes it.
"""

from __future__ import annotations

import binascii
import hashlib
from dataclasses import dataclass

from mantis_core.bitstream.container import (
    HELLO_MAGIC,
    LAST_FLAG,
    LEVELS,
    SEVERAL,
    SHAPE,
    BitstreamError,
    Reason,
    StreamSpec,
    check_shape,
    opened,
    read_prefix,
    sealed,
    too_many_bytes,
    varint,
)

CHECKSUM_BYTES = 2
_REQUESTS = SEVERAL
_MAX_HELLO_BYTES = 21
_DIGEST_BYTES = 4
_ONES = 0xFFFF  # without the final XOR a zero byte could be appended unseen


@dataclass(frozen=True)
class Session:
    """What both ends know of every message: the input shape (H, W) and what a body holds.

    `requests`: whether all tasks are asked for by the server. `with_levels`: whether task fields
    hold probabilities; never beside `requests`. `with_answers`: whether the client's label is sent.
    The project's own client sends no answers in a session of requests.
    """

    input_shape: tuple[int, int]
    with_levels: bool = False
    with_answers: bool = False
    requests: bool = False


def write_hello(session: Session, spec: StreamSpec) -> bytes:
    """The bytes that open `session`. BitstreamError where `read_hello` would refuse them."""
    _check(session, spec)
    with_shape = session.input_shape != spec.input_shape
    flags = _REQUESTS * session.requests | LEVELS * session.with_levels | SHAPE * with_shape
    data = HELLO_MAGIC + bytes([spec.version << 4 | flags | LAST_FLAG * session.with_answers])
    data += spec.model_id
    if with_shape:
        data += varint(session.input_shape[0]) + varint(session.input_shape[1])
    return sealed(data)


def read_hello(data: bytes, spec: StreamSpec) -> Session:
    """The session that a hello opens; BitstreamError, with a reason, for one of another model."""
    if len(data) > _MAX_HELLO_BYTES:
        raise BitstreamError(
            Reason.TOO_LARGE, f"a hello of {len(data)} bytes is over {_MAX_HELLO_BYTES}"
        )
    version, flags = read_prefix(data, HELLO_MAGIC)
    reader = opened(data, version, spec)
    session = Session(
        reader.shape(spec) if flags & SHAPE else spec.input_shape,
        with_levels=bool(flags & LEVELS),
        with_answers=bool(flags & LAST_FLAG),
        requests=bool(flags & _REQUESTS),
    )
    if reader.rest():
        raise BitstreamError(Reason.CORRUPT, "a hello has bytes behind its fields")
    _check(session, spec)
    return session


def pack_message(body: bytes, hello: bytes, asked: tuple[bool, ...], spec: StreamSpec) -> bytes:
    """A message: the body and its checksum. `asked` (K,) is () outside a session of requests."""
    if len(body) + CHECKSUM_BYTES > spec.max_stream_bytes:
        raise too_many_bytes(len(body) + CHECKSUM_BYTES, spec)
    return body + _checksum(body, hello, asked)


def unpack_message(data: bytes, hello: bytes, asked: tuple[bool, ...], spec: StreamSpec) -> bytes:
    """The body of a message; BitstreamError (truncated, corrupt, too_large) if it is none."""
    if len(data) > spec.max_stream_bytes:
        raise too_many_bytes(len(data), spec)
    if len(data) < CHECKSUM_BYTES:
        raise BitstreamError(
            Reason.TRUNCATED, f"the message has {len(data)} bytes, none has under {CHECKSUM_BYTES}"
        )
    body = data[:-CHECKSUM_BYTES]
    if _checksum(body, hello, asked) != data[-CHECKSUM_BYTES:]:
        raise BitstreamError(
            Reason.CORRUPT,
            f"the checksum of this {len(data)}-byte message fails: damaged, cut short, of another "
            "session or a reply to another request",
        )
    return body


def _checksum(body: bytes, hello: bytes, asked: tuple[bool, ...]) -> bytes:
    # A CRC is linear: over the tasks themselves it would take some requests for one another.
    digest = hashlib.sha256(hello + bytes(asked)).digest()[:_DIGEST_BYTES]
    found = binascii.crc_hqx(digest + body, _ONES) ^ _ONES
    return found.to_bytes(CHECKSUM_BYTES, "big")


def _check(session: Session, spec: StreamSpec) -> None:
    check_shape(session.input_shape, 1, spec)
    if spec.version < 2:
        raise BitstreamError(Reason.VERSION, "a model of format version 1 has no sessions")
    if session.with_answers and not spec.confidence:
        raise BitstreamError(Reason.CORRUPT, "a session with answers of a client that sends none")
    if session.requests and session.with_levels:
        raise BitstreamError(
            Reason.CORRUPT, "a session of requests sends no probabilities of tasks"
        )
