"""Requests for a load: good ones with their right answers, and hostile ones. Knows no model.

A hostile request is decided by its number alone, so that a load can be repeated.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from mantis_core.bitstream.container import (
    HELLO_MAGIC,
    LEVELS,
    MAGIC,
    SEVERAL,
    SHAPE,
    sealed,
    varint,
)

ANSWERS, MESSAGES, HELLO = "/v1/answers", "/v1/messages", "Mantis-Hello"
CHECKSUM_BYTES, HEADER_BYTES = 4, 7
SIDES = (1, 16, 320, 1024, 65_535)  # pixels
COUNTS = (2, 3, 32, 256, 257, 2**31)  # images of a stream


@dataclass(frozen=True)
class Asked:
    """A request. `right` holds the answers that are right, as `told` gives them."""

    body: bytes
    path: str = ANSWERS
    headers: dict[str, str] = field(default_factory=dict)
    right: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The request as JSON values."""
        return {**self.__dict__, "body": base64.b64encode(self.body).decode()}


@dataclass(frozen=True)
class Material:
    """What hostile requests are made of: good streams, a hello and good messages of its session.

    `max_body` are the bytes that the service takes.
    """

    streams: tuple[bytes, ...]
    hello: bytes
    messages: tuple[bytes, ...]
    max_body: int

    def to_json(self) -> dict[str, Any]:
        """The material as JSON values."""
        return {
            "streams": [base64.b64encode(each).decode() for each in self.streams],
            "hello": base64.b64encode(self.hello).decode(),
            "messages": [base64.b64encode(each).decode() for each in self.messages],
            "max_body": self.max_body,
        }


def asked_from(values: Mapping[str, Any]) -> Asked:
    """What `Asked.to_json` gave, once through JSON."""
    own = {"body": base64.b64decode(values["body"]), "right": tuple(values["right"])}
    return Asked(**{**values, **own})


def material_from(values: Mapping[str, Any]) -> Material:
    """What `Material.to_json` gave, once through JSON."""
    return Material(
        tuple(base64.b64decode(each) for each in values["streams"]),
        base64.b64decode(values["hello"]),
        tuple(base64.b64decode(each) for each in values["messages"]),
        values["max_body"],
    )


def told(answer: Mapping[str, Any]) -> str:
    """What must be right in an answer, as text: the model, tasks, labels and class.

    Probabilities are left out, since their last bits depend on the size of a batch.
    """
    names = ("model_id", "tasks", "labels", "class_index")
    return json.dumps([answer.get(name) for name in names], sort_keys=True)


def which_right(asked: Asked, content: bytes) -> int:
    """The place in `asked.right` of the answer that a reply holds, -1 for none of them."""
    try:
        answers = json.loads(content)["answers"]
        return asked.right.index(told(answers[0])) if len(answers) == 1 else -1
    except (ValueError, KeyError, TypeError, AttributeError):
        return -1


def hostile(number: int, material: Material) -> tuple[str, Asked]:
    """The hostile request of a number, and its kind."""
    random = Random(number)
    (kind,) = random.choices(list(KINDS), [weight for weight, _ in KINDS.values()])
    return kind, KINDS[kind][1](random, material)


def _empty(random: Random, material: Material) -> Asked:
    return Asked(b"", random.choice((ANSWERS, MESSAGES)))


def _noise(random: Random, material: Material) -> Asked:
    return Asked(random.randbytes(random.randint(1, 4096)))


def _truncated(random: Random, material: Material) -> Asked:
    stream = random.choice(material.streams)
    return Asked(stream[: random.randrange(len(stream))])


def _flipped(random: Random, material: Material) -> Asked:
    return Asked(_with_flips(random, random.choice(material.streams)))


def _another_id(random: Random, material: Material) -> Asked:
    stream = random.choice(material.streams)
    return Asked(sealed(stream[:3] + random.randbytes(4) + stream[HEADER_BYTES:-CHECKSUM_BYTES]))


def _forged(random: Random, material: Material) -> Asked:
    """Another body under a right header and checksum: only the coder can refuse it."""
    stream = random.choice(material.streams)
    if random.random() < 0.5:
        body = _with_flips(random, stream[HEADER_BYTES:-CHECKSUM_BYTES])
    else:
        body = random.randbytes(random.randint(0, 200))
    return Asked(sealed(stream[:HEADER_BYTES] + body))


def _claims(random: Random, material: Material) -> Asked:
    """A right checksum over a header that promises images, shapes and flags at random."""
    stream = random.choice(material.streams)
    flags = random.randrange(16)
    header = bytearray(MAGIC)
    header.append(
        random.choice((stream[2] >> 4, stream[2] >> 4, random.randrange(16))) << 4 | flags
    )
    header += stream[3:HEADER_BYTES]
    if flags & SEVERAL:
        header += varint(random.choice(COUNTS))
    if flags & SHAPE:
        header += varint(random.choice(SIDES)) + varint(random.choice(SIDES))
    body = stream[HEADER_BYTES:-CHECKSUM_BYTES] if flags & LEVELS else random.randbytes(64)
    return Asked(sealed(bytes(header) + body))


def _hello(random: Random, material: Material) -> Asked:
    """The hello of a session where a stream belongs, or a forged one."""
    if random.random() < 0.5:
        return Asked(material.hello)
    return Asked(sealed(HELLO_MAGIC + random.randbytes(random.randint(5, 20))))


def _message(random: Random, material: Material) -> Asked:
    """A damaged message, or noise, in a session that exists."""
    message = random.choice(material.messages)
    damaged = (
        _with_flips(random, message),
        message[: random.randrange(len(message))],
        random.randbytes(random.randint(1, 200)),
    )
    return Asked(random.choice(damaged), MESSAGES, {HELLO: _header(material.hello)})


def _session(random: Random, material: Material) -> Asked:
    """A good message in a session that nobody opened."""
    texts = (
        _header(_with_flips(random, material.hello)),
        _header(sealed(_with_flips(random, material.hello[:-CHECKSUM_BYTES]))),
        _header(random.randbytes(random.randint(0, 100))),
        "no base64 at all",
    )
    return Asked(random.choice(material.messages), MESSAGES, {HELLO: random.choice(texts)})


def _oversize(random: Random, material: Material) -> Asked:
    return Asked(material.streams[0] + bytes(material.max_body))


def _with_flips(random: Random, data: bytes) -> bytes:
    """The same bytes with one to three of their bits turned; of no bytes one."""
    if not data:
        return random.randbytes(1)
    changed = bytearray(data)
    for bit in random.sample(range(8 * len(data)), random.randint(1, 3)):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _header(hello: bytes) -> str:
    return base64.b64encode(hello).decode()


KINDS: dict[str, tuple[int, Callable[[Random, Material], Asked]]] = {
    "empty": (5, _empty),
    "noise": (12, _noise),
    "truncated": (12, _truncated),
    "flipped": (12, _flipped),
    "another_id": (12, _another_id),
    "forged": (12, _forged),
    "claims": (12, _claims),
    "hello": (5, _hello),
    "message": (8, _message),
    "session": (8, _session),
    "oversize": (2, _oversize),
}
"""Kinds of hostile requests, with their weight among all."""
