"""Streams and messages as a whole: images to bytes and back, by integer tables. No networks.

C h w of the latent, H W input pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from mantis_core.bitstream.coder import (
    TOTAL,
    Ints,
    RangeReader,
    RangeWriter,
    TableSet,
    exact_model,
)
from mantis_core.bitstream.container import Stream, StreamSpec, pack, unpack
from mantis_core.bitstream.entropy import stream
from mantis_core.bitstream.session import (
    CHECKSUM_BYTES,
    Session,
    pack_message,
    unpack_message,
)
from mantis_core.bitstream.task_field import (
    MAX_LEVEL,
    TaskField,
    put_primary,
    put_task_field,
    take_primary,
    take_task_field,
)


@dataclass(frozen=True, eq=False)
class CodedImage:
    """One image as it is sent: the task field and the latent, a map (C, h, w) of int32.

    `label` is the client's own answer within the primary task. Without `has_latent` the client has
    answered the image itself: it has a label, one active task, and the map is zero and not sent.
    `confidence` is how sure the client is of its label, a level from 0 to 7. Where it is sent, an
    image with a latent has a label too. Without it, the level in the task field of an answered
    image is that of the answer's probability. `rate_level` is the model's rate that the latent was
    coded at, 0 without one.
    """

    tasks: TaskField
    map: Ints
    label: int | None = None
    confidence: int | None = None
    has_latent: bool = True
    rate_level: int = 0


class Packed(NamedTuple):
    """A stream, and how many of its bytes are payload: coded latents and the client's answers
    beside them. Task fields cost fractions of bytes.

    `session_bytes` is what a message of this body takes in a session, without its hello.
    """

    data: bytes
    payload_bytes: float
    session_bytes: int


@dataclass(frozen=True, eq=False)
class Unpacked:
    """What a stream or a message holds. All its images have `input_shape` (H, W).

    `stream_id` are the 4 bytes that name what it was coded with.
    """

    images: tuple[CodedImage, ...]
    input_shape: tuple[int, int]
    wire_bytes: int
    payload_bytes: float
    stream_id: bytes


def write_stream(
    images: Sequence[CodedImage],
    input_shape: tuple[int, int],
    tables: TableSet,
    spec: StreamSpec,
) -> Packed:
    """One stream of one image or several. All of them send levels, or none does; so for answers.

    Raises BitstreamError (too_large) for more images or pixels than a stream may hold, ValueError
    for symbols, a label or a level that are none of this model's.
    """
    writer = RangeWriter()
    form = _form_of(images, input_shape, spec)
    field_bits = sum(_put_image(writer, image, form, tables, spec) for image in images)
    body = writer.close()
    data = pack(Stream(len(images), input_shape, form.with_levels, body, form.with_answers), spec)
    return Packed(data, _payload_bytes(body, field_bits), len(body) + CHECKSUM_BYTES)


def read_stream(data: bytes, tables: TableSet, spec: StreamSpec) -> Unpacked:
    """The images of a stream; BitstreamError, with a reason, if it is not one of this model's.

    What is returned of a stream of version 1 codes to just these bytes.
    """
    found = unpack(data, spec)
    form = Session(found.input_shape, found.with_levels, found.with_answers)
    reader = RangeReader(found.body, exact=spec.version == 1)
    images = [_take_image(reader, form, (), tables, spec) for _ in range(found.num_images)]
    reader.close()
    return Unpacked(
        tuple(images),
        found.input_shape,
        len(data),
        _payload_bytes(found.body, sum(_field_bits(image, form, spec) for image in images)),
        spec.model_id,
    )


def write_message(
    image: CodedImage, session: Session, hello: bytes, tables: TableSet, spec: StreamSpec
) -> Packed:
    """One image as a message of a session that was opened with `hello`.

    In a session of requests its task field holds just the tasks that were asked for. Raises
    ValueError for an image that is not of this session.
    """
    if (image.tasks.levels is not None) != session.with_levels:
        raise ValueError("an image of a session must send levels as the session says")
    writer = RangeWriter()
    field_bits = _put_image(writer, image, session, tables, spec)
    body = writer.close()
    asked = image.tasks.mask if session.requests else ()
    data = pack_message(body, hello, asked, spec)
    return Packed(data, _payload_bytes(body, field_bits), len(data))


def read_message(
    data: bytes,
    session: Session,
    hello: bytes,
    tables: TableSet,
    spec: StreamSpec,
    asked: tuple[bool, ...] = (),
) -> Unpacked:
    """The image of a message of a session; BitstreamError, with a reason, if it is none.

    `asked` (K,) are the tasks that were asked for, in a session of requests alone; ValueError if
    they are missing there, or given elsewhere.
    """
    if len(asked) != (spec.num_tasks if session.requests else 0) or (asked and not any(asked)):
        raise ValueError(
            f"asked for {asked}: a session of requests needs a bool for each of {spec.num_tasks} "
            "tasks, at least one of them true; others take none"
        )
    body = unpack_message(data, hello, asked, spec)
    image = _take_image(RangeReader(body, exact=False), session, asked, tables, spec)
    bits = _field_bits(image, session, spec)
    payload_bytes = _payload_bytes(body, bits)
    return Unpacked((image,), session.input_shape, len(data), payload_bytes, spec.model_id)


def _form_of(
    images: Sequence[CodedImage], input_shape: tuple[int, int], spec: StreamSpec
) -> Session:
    """What a stream of these images says of them; ValueError for a mixture."""
    with_levels = bool(images) and images[0].tasks.levels is not None
    if any((image.tasks.levels is not None) != with_levels for image in images):
        raise ValueError("some images of a stream send levels and some do not")
    with_answers = any(image.confidence is not None for image in images)
    if with_answers and not spec.confidence:
        raise ValueError("an image has a confidence, and the model's client sends no answers")
    return Session(input_shape, with_levels, with_answers)


def _put_image(
    writer: RangeWriter, image: CodedImage, form: Session, tables: TableSet, spec: StreamSpec
) -> float:
    """Codes all of an image; returns the bits of what is no latent."""
    shape = spec.latent_shape(form.input_shape)
    given, wanted = (image.map.shape, len(image.tasks.mask)), (shape, spec.num_tasks)
    if given != wanted:
        raise ValueError(f"map and tasks are {given}, must be {wanted}")
    bits = _put_fields(writer, image, form, spec)
    if image.has_latent:
        writer.put_symbols(
            image.map, tables.table_for(image.tasks.mask, image.tasks.primary, image.rate_level)
        )
    return bits


def _put_fields(writer: RangeWriter, image: CodedImage, form: Session, spec: StreamSpec) -> float:
    """Codes task field, the client's answer and the latent's rate level; returns their bits."""
    levels = spec.rate_levels if image.has_latent else 1
    if not 0 <= image.rate_level < levels:
        raise ValueError(f"rate level {image.rate_level}: the image may have {levels}")
    put_tasks = put_primary if form.requests else put_task_field
    bits = put_tasks(writer, image.tasks) + _put_answer(writer, image, form, spec)
    if levels > 1:
        writer.put(image.rate_level, stream.model.Uniform(levels))
        bits += math.log2(levels)
    return bits


def _take_image(
    reader: RangeReader,
    form: Session,
    asked: tuple[bool, ...],
    tables: TableSet,
    spec: StreamSpec,
) -> CodedImage:
    if form.requests:
        tasks = take_primary(reader, asked)
    else:
        tasks = take_task_field(reader, spec.num_tasks, with_levels=form.with_levels)
    label, confidence, answered = _take_answer(reader, tasks, form, spec)
    shape = spec.latent_shape(form.input_shape)
    if answered:
        return CodedImage(tasks, np.zeros(shape, np.int32), label, confidence, has_latent=False)
    rate = reader.take(stream.model.Uniform(spec.rate_levels)) if spec.rate_levels > 1 else 0
    symbols = reader.take_symbols(tables.table_for(tasks.mask, tasks.primary, rate), shape)
    return CodedImage(tasks, symbols, label, confidence, rate_level=rate)


def _field_bits(image: CodedImage, form: Session, spec: StreamSpec) -> float:
    return _put_fields(RangeWriter(), image, form, spec)


def _may_answer(tasks: TaskField, spec: StreamSpec) -> int:
    """How many labels the only active task has; 0 where the client cannot have answered."""
    return spec.labels[tasks.primary] if spec.labels and len(tasks.active) == 1 else 0


def _put_answer(writer: RangeWriter, image: CodedImage, form: Session, spec: StreamSpec) -> float:
    """Codes the client's label, how sure it is, and whether that is all.

    Returns the bits that are no payload: where answers are sent beside latents, none. Raises
    ValueError for a label or a level that this image cannot have.
    """
    may_end = _may_answer(image.tasks, spec)
    labels = spec.labels[image.tasks.primary] if form.with_answers else may_end
    said, sure = image.label, image.confidence
    if said is not None and not 0 <= said < labels:
        raise ValueError(f"label {said}: the stream may hold one of {labels} here")
    if not image.has_latent and (said is None or not may_end):
        raise ValueError("an image without latent needs a label of its one active task")
    if not labels:
        if sure is not None:
            raise ValueError(f"confidence {sure}: the image has no label that it could belong to")
        return 0.0
    answered = int(not image.has_latent)
    if not form.with_answers:
        if sure is not None or (said is not None) != bool(answered):
            raise ValueError("beside a latent a label is sent with its confidence or not at all")
        writer.put(answered, _ANSWERED)
        return 1.0 if said is None else 1.0 + _put_label(writer, said, labels)
    counts = spec.confidence[_confidence_row(image.tasks)]
    if said is None or sure is None or not 0 <= sure < len(counts):
        raise ValueError(
            f"label {said}, confidence {sure}: where answers are sent, each image needs both, "
            f"the second from 0 to {len(counts) - 1}"
        )
    writer.put(sure, _confidence_model(counts))
    _put_label(writer, said, labels)
    if may_end:
        writer.put(answered, _ends(sure))
    return 0.0


def _put_label(writer: RangeWriter, label: int, labels: int) -> float:
    if labels == 1:
        return 0.0
    writer.put(label, stream.model.Uniform(labels))
    return math.log2(labels)


def _take_answer(
    reader: RangeReader, tasks: TaskField, form: Session, spec: StreamSpec
) -> tuple[int | None, int | None, bool]:
    """The client's label and confidence, None where they are not sent, and whether that is all."""
    may_end = _may_answer(tasks, spec)
    if form.with_answers:
        labels = spec.labels[tasks.primary]
        if not labels:
            return None, None, False
        confidence = reader.take(_confidence_model(spec.confidence[_confidence_row(tasks)]))
        label = _take_label(reader, labels)
        answered = bool(may_end) and bool(reader.take(_ends(confidence)))
        return label, confidence, answered
    if not may_end or not reader.take(_ANSWERED):
        return None, None, False
    return _take_label(reader, may_end), None, True


def _take_label(reader: RangeReader, labels: int) -> int:
    return reader.take(stream.model.Uniform(labels)) if labels > 1 else 0


def _confidence_row(tasks: TaskField) -> int:
    """Which counts of confidence an image has: by the level of its primary task, if it is sent."""
    if tasks.levels is None:
        return MAX_LEVEL + 1
    return tasks.levels[tasks.active.index(tasks.primary)]


@lru_cache(maxsize=4096)
def _confidence_model(counts: tuple[int, ...]) -> Any:
    return exact_model(np.array(counts))


def _ends(confidence: int) -> Any:
    """The model of "with a latent, without": even odds where the client is surest."""
    return _ANSWERED if confidence >= _SURE else _SELDOM


_ANSWERED = stream.model.Uniform(2)
_SURE = 6
_SELDOM = exact_model(np.array((TOTAL - TOTAL // 16, TOTAL // 16)))


def _payload_bytes(body: bytes, field_bits: float) -> float:
    """Bytes of the body without rate levels and task fields, rounded to 1/1024.

    Rounded, the mean over images is the same in any order.
    """
    return max(0.0, round(1024 * (len(body) - field_bits / 8)) / 1024)
