"""Streams as a whole: task fields and latents to bytes and back, by integer tables. No networks.

C h w of the latent, H W input pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from constriction import stream

from mantis_core.bitstream.coder import Ints, RangeReader, RangeWriter, TableSet
from mantis_core.bitstream.container import Stream, StreamSpec, pack, unpack
from mantis_core.bitstream.task_field import TaskField, put_task_field, take_task_field


@dataclass(frozen=True, eq=False)
class CodedImage:
    """One image as it is sent: the task field and the latent, a map (C, h, w) of int32.

    With a `label`, one of its only active task, the client has answered the image itself. Then the
    level in the task field is that of the answer's probability, and the map is zero and not sent.
    """

    tasks: TaskField
    map: Ints
    label: int | None = None


class Packed(NamedTuple):
    """A stream and how many of its bytes are coded latents; task fields cost fractions of bytes."""

    data: bytes
    payload_bytes: float


@dataclass(frozen=True, eq=False)
class Unpacked:
    """What a stream holds. All its images have `input_shape` (H, W)."""

    images: tuple[CodedImage, ...]
    input_shape: tuple[int, int]
    wire_bytes: int
    payload_bytes: float


def write_stream(
    images: Sequence[CodedImage],
    input_shape: tuple[int, int],
    tables: TableSet,
    spec: StreamSpec,
) -> Packed:
    """One stream of one image or several. All of them send levels, or none does.

    Raises BitstreamError (too_large) for more images or pixels than a stream may hold, ValueError
    for symbols or a label that are none of this model's.
    """
    writer = RangeWriter()
    with_levels = bool(images) and images[0].tasks.levels is not None
    shape = spec.latent_shape(input_shape)
    field_bits = 0.0
    for image in images:
        if (image.tasks.levels is not None) != with_levels:
            raise ValueError("some images of a stream send levels and some do not")
        given, wanted = (image.map.shape, len(image.tasks.mask)), (shape, spec.num_tasks)
        if given != wanted:
            raise ValueError(f"map and tasks are {given}, must be {wanted}")
        field_bits += put_task_field(writer, image.tasks)
        field_bits += _put_label(writer, image, spec)
        if image.label is None:
            table = tables.table_for(image.tasks.mask, image.tasks.primary)
            writer.put_symbols(image.map, table)
    body = writer.close()
    data = pack(Stream(len(images), input_shape, with_levels, body), spec)
    return Packed(data, _payload_bytes(body, field_bits))


def read_stream(data: bytes, tables: TableSet, spec: StreamSpec) -> Unpacked:
    """The images of a stream; BitstreamError, with a reason, if it is not one of this model's.

    What is returned codes to just these bytes.
    """
    found = unpack(data, spec)
    shape = spec.latent_shape(found.input_shape)
    reader = RangeReader(found.body)
    images = []
    for _ in range(found.num_images):
        tasks = take_task_field(reader, spec.num_tasks, with_levels=found.with_levels)
        label = _take_label(reader, tasks, spec)
        if label is None:
            symbols = reader.take_symbols(tables.table_for(tasks.mask, tasks.primary), shape)
        else:
            symbols = np.zeros(shape, np.int32)
        images.append(CodedImage(tasks, symbols, label))
    reader.close()
    again = RangeWriter()
    field_bits = sum(
        put_task_field(again, image.tasks) + _put_label(again, image, spec) for image in images
    )
    return Unpacked(
        tuple(images), found.input_shape, len(data), _payload_bytes(found.body, field_bits)
    )


def _may_answer(tasks: TaskField, spec: StreamSpec) -> int:
    """How many labels the only active task has; 0 where the client cannot have answered."""
    return spec.labels[tasks.primary] if spec.labels and len(tasks.active) == 1 else 0


def _put_label(writer: RangeWriter, image: CodedImage, spec: StreamSpec) -> float:
    """Codes whether the client has answered, and what; returns the cost in bits.

    Raises ValueError for a label that this image cannot have.
    """
    labels = _may_answer(image.tasks, spec)
    if image.label is not None and not 0 <= image.label < labels:
        raise ValueError(f"label {image.label}: the stream may hold one of {labels} here")
    if not labels:
        return 0.0
    writer.put(int(image.label is not None), _ANSWERED)
    if image.label is None or labels == 1:
        return 1.0
    writer.put(image.label, stream.model.Uniform(labels))
    return 1.0 + math.log2(labels)


def _take_label(reader: RangeReader, tasks: TaskField, spec: StreamSpec) -> int | None:
    labels = _may_answer(tasks, spec)
    if not labels or not reader.take(_ANSWERED):
        return None
    return reader.take(stream.model.Uniform(labels)) if labels > 1 else 0


_ANSWERED = stream.model.Uniform(2)


def _payload_bytes(body: bytes, field_bits: float) -> float:
    """Bytes of the body without the task fields, rounded to 1/1024.

    Rounded, the mean over images is the same in any order.
    """
    return max(0.0, round(1024 * (len(body) - field_bits / 8)) / 1024)
