"""Streams as a whole: task fields and latents to bytes and back, by integer tables. No networks.

C h w of the latent's map, G of its summary, H W input pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mantis_core.bitstream import Stream, StreamSpec, pack, unpack
from mantis_core.coder import Ints, RangeReader, RangeWriter, TableSet, split_table
from mantis_core.task_field import TaskField, put_task_field, take_task_field


@dataclass(frozen=True, eq=False)
class CodedImage:
    """One image as it is sent: task field, the latent's map (C, h, w) and summary (G,), int32."""

    tasks: TaskField
    map: Ints
    summary: Ints = field(default_factory=lambda: np.zeros(0, np.int32))


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
    for symbols that are none of this model's.
    """
    writer = RangeWriter()
    with_levels = bool(images) and images[0].tasks.levels is not None
    shape = spec.latent_shape(input_shape)
    field_bits = 0.0
    for image in images:
        if (image.tasks.levels is not None) != with_levels:
            raise ValueError("some images of a stream send levels and some do not")
        given = (image.map.shape, image.summary.shape, len(image.tasks.mask))
        wanted = (shape, (spec.summary_channels,), spec.num_tasks)
        if given != wanted:
            raise ValueError(f"map, summary and tasks are {given}, must be {wanted}")
        field_bits += put_task_field(writer, image.tasks)
        table = tables.table_for(image.tasks.mask, image.tasks.primary)
        of_map, of_summary = split_table(table, spec.latent_channels)
        if of_summary is not None:
            writer.put_symbols(image.summary[:, None, None], of_summary)
        if of_map is not None:
            writer.put_symbols(image.map, of_map)
    body = writer.close()
    data = pack(Stream(len(images), input_shape, with_levels, body), spec)
    return Packed(data, _payload_bytes(body, field_bits))


def read_stream(data: bytes, tables: TableSet, spec: StreamSpec) -> Unpacked:
    """The images of a stream; BitstreamError, with a reason, if it is not one of this model's.

    What is returned codes to just these bytes.
    """
    stream = unpack(data, spec)
    shape = spec.latent_shape(stream.input_shape)
    reader = RangeReader(stream.body)
    images = []
    for _ in range(stream.num_images):
        tasks = take_task_field(reader, spec.num_tasks, with_levels=stream.with_levels)
        table = tables.table_for(tasks.mask, tasks.primary)
        of_map, of_summary = split_table(table, spec.latent_channels)
        summary = np.zeros(0, np.int32)
        if of_summary is not None:
            summary = reader.take_symbols(of_summary, (spec.summary_channels, 1, 1)).reshape(-1)
        symbols = np.zeros(shape, np.int32)
        if of_map is not None:
            symbols = reader.take_symbols(of_map, shape)
        images.append(CodedImage(tasks, symbols, summary))
    reader.close()
    field_bits = sum(put_task_field(RangeWriter(), image.tasks) for image in images)
    return Unpacked(
        tuple(images), stream.input_shape, len(data), _payload_bytes(stream.body, field_bits)
    )


def _payload_bytes(body: bytes, field_bits: float) -> float:
    """In steps of 1/1024, so that a mean over images is the same in any order."""
    return max(0.0, round(1024 * (len(body) - field_bits / 8)) / 1024)
