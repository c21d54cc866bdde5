"""Encodes and decodes files one after another. A file that cannot be read does not end the work.

Holds one image, or the images of one stream, in memory at a time. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mantis_core.bitstream.container import MAX_IMAGES, BitstreamError, peek
from mantis_core.device.files import Failure, FilesError, Source, read, shown
from mantis_core.errors import BudgetError
from mantis_core.pixels import ImageError
from pipelines.coding.packed import read_image

if TYPE_CHECKING:
    from mantis_core.codec.answer import Answer
    from mantis_core.codec.client_codec import ClientCodec
    from mantis_core.codec.server_codec import ServerCodec
    from mantis_core.device.look import Seen


@dataclass(frozen=True)
class Asked:
    """What the client is asked: the tasks to send (None: detect them), its early exit, the rate.

    `level` is a rate level, `max_bytes` the most that the stream of an image may take.
    """

    tasks: tuple[str, ...] | None = None
    exit_confidence: float | None = None
    level: int | None = None
    max_bytes: int | None = None


@dataclass(frozen=True)
class Coded:
    """A stream, and the images in it, in order."""

    data: bytes
    images: tuple[Source, ...]


@dataclass(frozen=True)
class Decoded:
    """The answers to the images of one file, in order; its stream has `wire_bytes`."""

    source: Source
    wire_bytes: int
    answers: tuple[Answer, ...]


def encode_each(
    codec: ClientCodec, sources: Iterable[Source], asked: Asked
) -> Iterator[Coded | Failure]:
    """Yields one stream for each image, or why there is none."""
    for source in sources:
        seen = _look(codec, source, asked)
        if isinstance(seen, Failure):
            yield seen
        else:
            yield Coded(codec.write_together([seen]), (source,))


def encode_together(
    codec: ClientCodec, sources: Sequence[Source], asked: Asked
) -> Iterator[Failure | Coded | None]:
    """Yields a Failure or None for each image, then one stream of all that could be read.

    Yields no stream if none could be read.
    """
    inside: list[tuple[Source, Seen]] = []
    for source in sources:
        seen = _look(codec, source, asked)
        if isinstance(seen, Failure):
            yield seen
        else:
            inside.append((source, seen))
            yield None
    if inside:
        images, looks = zip(*inside, strict=True)
        yield Coded(codec.write_together(looks), images)


def check_together(count: int) -> None:
    """Raises FilesError if so many images do not fit into one stream."""
    if count > MAX_IMAGES:
        raise FilesError(
            f"{count} images are more than the {MAX_IMAGES} that one stream may hold. Give a "
            "folder as OUT for one stream for each image, or fewer images."
        )


def check_room(codec: ClientCodec, count: int) -> None:
    """Raises FilesError if so many images of the model's size have more pixels than a stream."""
    height, width = codec.spec.image_size
    most = codec.stream_spec.max_total_pixels // (height * width)
    if count > most:
        raise FilesError(
            f"{count} images of {height} x {width} pixels are more than the {most} that one stream "
            "may hold. Give a folder as OUT for one stream for each image, or fewer images."
        )


def decode_each(codec: ServerCodec, sources: Iterable[Source]) -> Iterator[Decoded | Failure]:
    """Yields the answers of each stream, or why there are none."""
    for source in sources:
        try:
            data = read(source.path)
            yield Decoded(source, len(data), tuple(codec.decode([data])))
        except FilesError as error:
            yield Failure(source.path, str(error))
        except BitstreamError as error:
            yield Failure(source.path, f"{shown(source.path)} cannot be decoded: {error}")


def predict_each(
    client: ClientCodec, server: ServerCodec, sources: Iterable[Source], asked: Asked
) -> Iterator[Decoded | Failure]:
    """Yields the answer to each image through its own stream, or why there is none."""
    for coded in encode_each(client, sources, asked):
        if isinstance(coded, Failure):
            yield coded
        else:
            (source,) = coded.images
            yield Decoded(source, len(coded.data), tuple(server.decode([coded.data])))


def is_stream_of(codec: ClientCodec, path: Path, max_bytes: int | None = None) -> bool:
    """Returns whether a file is a whole stream that this model has made, of at most `max_bytes`."""
    try:
        data = path.read_bytes()
        found: bool = peek(data)["stream_id"] == codec.ids.stream.hex()
    except (OSError, BitstreamError):
        return False
    return found and (max_bytes is None or len(data) <= max_bytes)


def _look(codec: ClientCodec, source: Source, asked: Asked) -> Seen | Failure:
    try:
        image = codec.prepare_image(read_image(source))
    except FilesError as error:
        return Failure(source.path, str(error))
    except ImageError as error:
        return Failure(source.path, f"{shown(source.path)} is no readable image: {error}")
    try:
        (seen,) = codec.look(
            image[None],
            asked.tasks,
            exit_confidence=asked.exit_confidence,
            level=asked.level,
            budget=codec.budget(asked.max_bytes),
        )
    except BudgetError as error:
        return Failure(source.path, f"{shown(source.path)}: {error}")
    return seen
