"""Streams as a whole: task fields and latents to bytes and back, by integer tables. No networks.

C latent channels, h w latent size, H W input pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mantis_core.bitstream import Stream, StreamSpec, pack, unpack
from mantis_core.coder import Ints, RangeReader, RangeWriter, TableSet
from mantis_core.task_field import TaskField, put_task_field, take_task_field


@dataclass(frozen=True, eq=False)
class CodedImage:
    """One image as it is sent: its task field and its latent's symbols (C, h, w) int32."""

    tasks: TaskField
    symbols: Ints


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
        if image.symbols.shape != shape or len(image.tasks.mask) != spec.num_tasks:
            raise ValueError(
                f"a latent {image.symbols.shape} with {len(image.tasks.mask)} tasks, must be "
                f"{shape} with {spec.num_tasks}"
            )
        field_bits += put_task_field(writer, image.tasks)
        table = tables.table_for(image.tasks.mask, image.tasks.primary)
        writer.put_symbols(image.symbols, table)
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
        images.append(CodedImage(tasks, reader.take_symbols(table, shape)))
    reader.close()
    field_bits = sum(put_task_field(RangeWriter(), image.tasks) for image in images)
    return Unpacked(
        tuple(images), stream.input_shape, len(data), _payload_bytes(stream.body, field_bits)
    )


def _payload_bytes(body: bytes, field_bits: float) -> float:
    """In steps of 1/1024, so that a mean over images is the same in any order."""
    return max(0.0, round(1024 * (len(body) - field_bits / 8)) / 1024)
