"""A bounded, seeded fuzzer of the stream reader: `make fuzz N=1000000`, a small run in the suite.

Every input is refused with a BitstreamError or decoded within the model's caps. What is accepted
without a checksum made for it must be one of the streams that were written; of the messages of a
session, whose checksum has 16 bits, one damaged in 10,000 may pass. Counts what it fed, refused and
accepted, and the CPU time and memory that the worst input took. An input may take a few times as
long as the longest stream that a client may write.
"""

import argparse
import binascii
import faulthandler
import hashlib
import json
import resource
import signal
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from rich.console import Console
from rich.progress import track

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.container import MAX_IMAGES, BitstreamError, StreamSpec
from mantis_core.bitstream.session import Session, read_hello, write_hello
from mantis_core.bitstream.task_field import TaskField
from mantis_core.bitstream.wire import (
    CodedImage,
    Unpacked,
    read_message,
    read_stream,
    write_message,
    write_stream,
)
from mantis_core.symbols import CONTEXTS, Prior
from tests.golden.cases import answered_image, named_image, random_image, random_tables, sure_counts

LIMIT_FACTOR = 3  # times the CPU time of the longest stream that may be written
TRIES = 5  # before an input counts as slow: another process may have taken the processor's caches
LIMIT_BYTES = 32 * 2**20
HUNG_SECONDS = 10
STREAMS_A_MODEL = 40
HEADER = 7  # magic, version and flags, model id
MAY_PASS = 1e-4  # of the damaged messages
SESSION = Session((32, 32), with_levels=True, with_answers=True)
OF_REQUESTS = Session((32, 32), requests=True)
ASKED = tuple(task in (2, 3, 7) for task in range(10))


@dataclass(frozen=True)
class Model:
    """What a reader knows, and streams that were written for it."""

    tables: TableSet
    spec: StreamSpec
    streams: tuple[bytes, ...]
    longest: bytes  # as many images as a stream may hold
    hello: bytes = b""  # of the session that `streams` are messages of, if they are
    session: Session = SESSION
    hellos: bool = False  # whether `streams` are hellos

    def read(self, data: bytes) -> Unpacked | Session:
        """Reads a stream, a hello, or a message of the session."""
        if self.hellos:
            return read_hello(data, self.spec)
        if self.hello:
            return read_message(data, self.session, self.hello, self.tables, self.spec, self.asked)
        return read_stream(data, self.tables, self.spec)

    @property
    def asked(self) -> tuple[bool, ...]:
        """What every message replies to."""
        return ASKED if self.session.requests else ()

    def sealed(self, body: bytes) -> bytes:
        """What has the right checksum behind it."""
        if self.hello:
            digest = hashlib.sha256(self.hello + bytes(self.asked)).digest()[:4]
            checksum = binascii.crc_hqx(digest + body, 0xFFFF) ^ 0xFFFF
            return body + checksum.to_bytes(2, "big")
        return body + zlib.crc32(body).to_bytes(4, "big")

    @property
    def frame(self) -> tuple[int, int]:
        """Bytes before what is damaged, and behind it: body and checksum, or a hello's fields."""
        if self.hellos:
            return 2, 4
        return (0, 2) if self.hello else (HEADER, 4)


@dataclass
class Tally:
    """What a run has seen. `wrongly_accepted` and `beyond_limits` must stay empty.

    `messages` are the damaged ones, `passed` those of them that were accepted.
    """

    by_kind: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    wrongly_accepted: list[str] = field(default_factory=list)
    beyond_limits: list[str] = field(default_factory=list)
    messages: int = 0
    passed: int = 0
    slowest_seconds: float = 0.0
    largest_bytes: int = 0


def make_model(
    prior: Prior,
    tasks: int,
    channels: int,
    size: int,
    seed: int,
    *,
    contexts: int = 1,
    labels: int = 0,
) -> Model:
    """A model of `size` pixels square with its streams: single, of another shape, several."""
    rows = 1 if prior == "shared" else tasks
    tables = random_tables(prior, rows, channels, seed, contexts=contexts)
    spec = StreamSpec(
        seed.to_bytes(4, "big"),
        tasks,
        (size, size),
        channels,
        8,
        labels=(labels,) * tasks if labels else (),
        max_pixels=16 * size * size,
        max_total_pixels=256 * size * size,
    )
    streams = []
    for number in range(STREAMS_A_MODEL):
        count = 1 if number % 4 else 1 + number % 5
        shape = (size, size) if number % 3 else (size + 8, size)
        latent = spec.latent_shape(shape)
        levels = bool(number % 2)
        seeds = range(1000 * number, 1000 * number + count)
        images = [
            answered_image(tasks, latent, levels=levels, seed=own, labels=labels)
            if labels and (own + number) % 2
            else random_image(tasks, latent, levels=levels, seed=own, reach=2 + number % 9)
            for own in seeds
        ]
        streams.append(write_stream(images, shape, tables, spec).data)
    many = [
        random_image(tasks, spec.latent_shape((size, size)), levels=True, seed=own, reach=10)
        for own in range(MAX_IMAGES)
    ]
    longest = write_stream(many, (size, size), tables, spec).data
    return Model(tables, spec, tuple(streams), longest)


def make_named_model(kind: str) -> Model:
    """A model of version 2 that sends answers and has rates: files, messages, replies or hellos."""
    tables = random_tables("primary", 10, 4, 6, contexts=CONTEXTS, levels=5)
    spec = StreamSpec(
        kind.encode()[:4],
        10,
        (32, 32),
        4,
        8,
        labels=(10,) * 10,
        max_pixels=16 * 32 * 32,
        max_total_pixels=256 * 32 * 32,
        version=2,
        rate_levels=5,
        confidence=sure_counts(6),
    )

    def image(seed: int) -> CodedImage:
        latent, answered = spec.latent_shape((32, 32)), seed % 3 == 2
        return named_image(spec, latent, levels=True, seed=seed, answered=answered)

    def reply(seed: int) -> CodedImage:
        first = (2, 3, 7)[seed % 3]
        own = random_image(10, spec.latent_shape((32, 32)), levels=False, seed=seed, reach=4)
        return replace(own, tasks=TaskField(ASKED, first, None), rate_level=seed % 5)

    if kind == "hellos":
        shapes = [(32, 32), *((8 + seed, 200 - seed) for seed in range(STREAMS_A_MODEL // 2 - 1))]
        hellos = [
            write_hello(replace(session, input_shape=shape), spec)
            for shape in shapes
            for session in (SESSION, OF_REQUESTS)
        ]
        return Model(tables, spec, tuple(hellos), max(hellos, key=len), hellos=True)
    if kind in ("messages", "replies"):
        session, make = (SESSION, image) if kind == "messages" else (OF_REQUESTS, reply)
        hello = write_hello(session, spec)
        messages = [
            write_message(make(seed), session, hello, tables, spec).data
            for seed in range(STREAMS_A_MODEL)
        ]
        return Model(tables, spec, tuple(messages), max(messages, key=len), hello, session)
    streams = [
        write_stream([image(seed) for seed in range(1 + number % 4)], (32, 32), tables, spec).data
        for number in range(STREAMS_A_MODEL)
    ]
    many = [image(3 * seed) for seed in range(MAX_IMAGES)]
    longest = write_stream(many, (32, 32), tables, spec).data
    return Model(tables, spec, tuple(streams), longest)


def models() -> list[Model]:
    """Every prior; both versions; contexts, answers, sessions and none; 360 streams in all."""
    return [
        make_model("primary", 10, 6, 32, 1),
        make_model("per_task", 5, 3, 16, 2),
        make_model("shared", 1, 2, 16, 3),
        make_model("primary", 4, 4, 32, 4, contexts=CONTEXTS),
        make_model("primary", 10, 3, 32, 5, labels=10),
        *(make_named_model(kind) for kind in ("files", "messages", "replies", "hellos")),
    ]


def thorough(model: Model) -> Iterator[tuple[str, bytes]]:
    """Each stream with each bit flipped, cut at each byte, and with a byte appended."""
    for data in model.streams:
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            yield "flip", bytes(damaged)
        for length in range(len(data)):
            yield "cut", data[:length]
        for extra in (0, 1, 255):
            yield "appended", data + bytes([extra])


def random_inputs(model: Model, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Without end: splices, noise, several flips, and forgeries under a right checksum."""
    while True:
        one, two = (model.streams[i] for i in rng.integers(len(model.streams), size=2))
        yield "splice", one[: rng.integers(len(one))] + two[rng.integers(len(two)) :]
        yield "noise", rng.bytes(int(rng.integers(0, 120)))
        damaged = bytearray(one)
        for position in rng.integers(len(one), size=rng.integers(2, 6)):
            damaged[position] = rng.integers(256)
        yield "bytes changed", bytes(damaged)
        before, behind = model.frame
        start = lengths = b""
        if before:
            flags = int(rng.integers(16))
            start = one[:2] + bytes([model.spec.version << 4 | flags]) + model.spec.model_id
            lengths = b"".join(_varint(rng) for _ in range(int(rng.integers(0, 4))))
        yield "forged header", model.sealed(start + lengths + one[before:-behind])
        noise = rng.bytes(int(rng.integers(0, 80)))
        yield "forged noise", model.sealed(start + lengths + noise)
        body = bytearray(one[:-behind])
        for position in rng.integers(before, len(body), size=rng.integers(1, 4)):
            body[position] ^= 1 << int(rng.integers(8))
        yield "forged body", model.sealed(bytes(body))
        cut = int(rng.integers(before, len(one) - behind))
        yield "forged cut", model.sealed(one[:cut])
        yield "forged splice", model.sealed(one[:cut] + two[before:-behind])
        zeros = bytes([0xFF * int(rng.integers(2))]) * int(rng.integers(0, 400))
        yield "forged run", model.sealed(start + lengths + zeros)


def run(count: int, seed: int = 0, *, show_progress: bool = False) -> Tally:
    """Feeds at least `count` inputs, or all flips and cuts if these are more.

    Any exception but BitstreamError ends it, as does an input that takes ten seconds of CPU time:
    the process prints where it stands, and dies.
    """
    faulthandler.register(signal.SIGVTALRM, chain=True)
    tally = Tally()
    rng = np.random.default_rng(seed)
    known = models()
    limits = {m.spec.model_id: LIMIT_FACTOR * least_seconds(m, m.longest) for m in known}
    fed = 0
    for model in known:
        written = set(model.streams)
        for kind, data in thorough(model):
            _feed(model, written, kind, data, tally, limits[model.spec.model_id])
            fed += 1
    endless = [(model, set(model.streams), random_inputs(model, rng)) for model in known]
    steps = range(max(0, count - fed))
    shown = track(steps, console=Console(stderr=True)) if show_progress else steps
    for step in shown:
        model, written, inputs = endless[step % len(endless)]
        kind, data = next(inputs)
        _feed(model, written, kind, data, tally, limits[model.spec.model_id])
    return tally


def least_seconds(model: Model, data: bytes) -> float:
    """The least CPU time in which an input is read or refused, of TRIES."""
    times = []
    for _ in range(TRIES):
        started = time.thread_time()
        with suppress(BitstreamError):
            model.read(data)
        times.append(time.thread_time() - started)
    return min(times)


def _feed(
    model: Model, written: set[bytes], kind: str, data: bytes, tally: Tally, limit: float
) -> None:
    tally.by_kind[kind] += 1
    measured = sum(tally.by_kind.values()) % 100 == 0  # tracing slows what it measures
    signal.setitimer(signal.ITIMER_VIRTUAL, HUNG_SECONDS)
    if measured:
        tracemalloc.start()
    started = time.thread_time()
    try:
        found = model.read(data)
    except BitstreamError as error:
        tally.refused[error.reason] += 1
        found = None
    seconds = time.thread_time() - started
    if measured:
        tally.largest_bytes = max(tally.largest_bytes, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if seconds > limit:
        seconds = least_seconds(model, data)
    if not measured:
        tally.slowest_seconds = max(tally.slowest_seconds, seconds)
    new = not kind.startswith("forged") and data not in written
    tally.messages += bool(model.hello) and new
    if found is not None:
        tally.accepted[kind] += 1
        if model.hello:
            tally.passed += new
        elif new or (isinstance(found, Unpacked) and not _is_as_written(model, found, data)):
            tally.wrongly_accepted.append(f"{kind}: {data.hex()}")
    if tally.largest_bytes > LIMIT_BYTES or seconds > limit:
        tally.beyond_limits.append(f"{kind}: {seconds:.3f} s: {data.hex()}")


def _is_as_written(model: Model, found: Unpacked, data: bytes) -> bool:
    """Whether what was read is written to the same bytes; from version 2 on readers do not ask."""
    if model.spec.version > 1:
        return True
    return write_stream(found.images, found.input_shape, model.tables, model.spec).data == data


def _varint(rng: np.random.Generator) -> bytes:
    value = int(rng.integers(2 ** int(rng.integers(1, 36))))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def main() -> int:
    """Prints one JSON object; exit code 1 if anything was believed wrongly or broke a limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="inputs to feed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    models()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = run(arguments.count, arguments.seed, show_progress=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result = {
        "inputs": sum(tally.by_kind.values()),
        "streams": STREAMS_A_MODEL * len(models()),
        "by_kind": dict(tally.by_kind),
        "refused": dict(tally.refused),
        "accepted": dict(tally.accepted),
        "wrongly_accepted": len(tally.wrongly_accepted),
        "damaged_messages": tally.messages,
        "messages_that_passed": tally.passed,
        "beyond_limits": len(tally.beyond_limits),
        "slowest_cpu_seconds": round(tally.slowest_seconds, 4),
        "largest_traced_bytes": tally.largest_bytes,
        "process_grew_by_bytes": grown * 1024,
    }
    for line in [*tally.wrongly_accepted[:5], *tally.beyond_limits[:5]]:
        print(line, file=sys.stderr)
    print(json.dumps(result))
    wrong = tally.wrongly_accepted or tally.beyond_limits or grown * 1024 > LIMIT_BYTES
    return int(bool(wrong or too_many_passed(tally)))


def too_many_passed(tally: Tally) -> bool:
    """Whether more damaged messages were accepted than a checksum of 16 bits explains.

    By chance one in 65,536 is; a few are no evidence of more.
    """
    return tally.passed > 3 + MAY_PASS * tally.messages


if __name__ == "__main__":
    sys.exit(main())
