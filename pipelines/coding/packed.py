"""Images inside Parquet files and tars: which there are, and the bytes of each.

Needs pyarrow for Parquet files, and the standard library for the rest. The list of a file's images,
and of a Parquet file the images of one row group, are kept until another file is read.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections.abc import Collection
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mantis_core.device.files import IMAGE_SUFFIXES, Failure, FilesError, Found, Source, read, shown

if TYPE_CHECKING:
    import pyarrow as pa

PACKED_SUFFIXES = frozenset((".parquet", ".tar"))
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixels", "bytes")
"""Names of columns of images; of several columns of bytes the first one here counts."""


class NoImages(FilesError):
    """Raised if a file holds no images, or it is open which they are."""


class Packed(Protocol):
    """An open file with images. `names` are those of its images, in order."""

    names: list[str]

    def read(self, name: str) -> bytes:
        """Returns an image file. Raises FilesError if there is none."""


def expand(found: Found, given: Collection[Path]) -> Found:
    """Returns what was found, with the images of each Parquet file and tar in its place.

    An image is named `<file>#<row>` or `<file>#<name in the tar>`; what is written of it has its
    number. A file that holds no images is a failure if it was among those `given`, and counts as
    one of another kind if a folder holds it.
    """
    sources: list[Source] = []
    for source in found.sources:
        if source.path.suffix.lower() not in PACKED_SUFFIXES:
            sources.append(source)
            continue
        try:
            names = opened(source.path).names
        except NoImages as error:
            if source.path in given:
                found.failures.append(Failure(source.path, str(error)))
            else:
                found.others[source.path.suffix.lower()] += 1
            continue
        except FilesError as error:
            found.failures.append(Failure(source.path, str(error)))
            continue
        for number, name in enumerate(names):
            path = Path(f"{source.path}#{name}")
            inside = (source.path, name)
            sources.append(Source(path, f"{source.place}/{number:06d}", inside))
    found.sources = sources
    return found


def read_image(source: Source) -> bytes:
    """Returns the bytes of an image file, wherever it is. Raises FilesError."""
    if source.inside is None:
        return read(source.path)
    file, name = source.inside
    return opened(file).read(name)


def image_columns(schema: pa.Schema) -> list[str]:
    """Returns the columns that may hold encoded images: one, if its type or its name tells it."""
    found = [each.name for each in schema if _holds_bytes(each.type)]
    named = [name for name in IMAGE_NAMES if name in found]
    return named[:1] or found


@lru_cache(maxsize=1)
def opened(path: Path) -> Packed:
    """Opens a Parquet file or a tar. Raises FilesError if that fails, NoImages if it has none."""
    return _Tar(path) if path.suffix.lower() == ".tar" else _Parquet(path)


class _Parquet:
    """Rows of a Parquet file, named by their number from 0."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise FilesError(
                f"cannot read {shown(path)}: Parquet files need pyarrow. Install it, or give image "
                "files"
            ) from error
        self._path, self._errors = path, (pa.ArrowException, OSError)
        try:
            self._file = pq.ParquetFile(path)
        except self._errors as error:
            raise FilesError(f"{shown(path)} is no readable Parquet file: {error}") from error
        columns = image_columns(self._file.schema_arrow)
        if len(columns) != 1:
            several = f"several columns of bytes, {', '.join(columns)}: call that of images image"
            raise NoImages(
                f"{shown(path)} has " + (several if columns else "no column of encoded images")
            )
        (self._column,) = columns
        about = self._file.metadata
        rows = (about.row_group(group).num_rows for group in range(about.num_row_groups))
        self._ends = list(accumulate(rows))  # of each row group
        self.names = [str(row) for row in range(about.num_rows)]
        self._first, self._images = 0, pa.chunked_array([], pa.binary())  # of a row group

    def read(self, name: str) -> bytes:
        """Returns the image of a row."""
        row = int(name)
        if not self._first <= row < self._first + len(self._images):
            self._hold(row)
        value = self._images[row - self._first].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not value:
            raise FilesError(f"{shown(self._path)}#{name} holds no image")
        return bytes(value)

    def _hold(self, row: int) -> None:
        group = bisect_right(self._ends, row)
        try:
            column = self._file.read_row_group(group, columns=[self._column])[self._column]
        except self._errors as error:
            raise FilesError(f"cannot read {shown(self._path)}: {error}") from error
        self._first, self._images = self._ends[group] - len(column), column


class _Tar:
    """Image files of a tar, named as in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as file:
                members = [each for each in file if each.isfile()]
        except (tarfile.TarError, OSError) as error:
            raise FilesError(f"{shown(path)} is no readable tar: {error}") from error
        self._places = {m.name: (m.offset_data, m.size) for m in members if _is_image(m.name)}
        if not self._places:
            raise NoImages(f"{shown(path)} holds no image files")
        self.names = list(self._places)

    def read(self, name: str) -> bytes:
        """Returns the file of that name."""
        place, size = self._places[name]
        try:
            with self._path.open("rb") as file:
                file.seek(place)
                return file.read(size)
        except OSError as error:
            raise FilesError(f"cannot read {shown(self._path)}#{shown(name)}: {error}") from error


def _is_image(name: str) -> bool:
    stem, suffix = os.path.splitext(name)
    return suffix.lower() in IMAGE_SUFFIXES and not os.path.basename(stem).startswith(".")


def _holds_bytes(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))
