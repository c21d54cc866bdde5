"""The `parquet` source: encoded images and labels in Parquet files, locally or below a URI."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from data_prep.checks import Rejection, mask_values
from data_prep.errors import DataError
from data_prep.sources.base import (
    RawRow,
    SourceConfig,
    cells,
    class_id_of,
    digest,
    files_of_split,
    references,
    with_notes,
)
from data_prep.sources.class_ids import CLASS_IDS, ClassIds, Labels
from data_prep.sources.remembering import remembered
from data_prep.storage import filesystem, in_threads, join, unreadable

READ_ROWS = 64

Value = TypeVar("Value")


class Presence(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A class of an image that is read from its mask: present where enough pixels have a value."""

    mask: str
    """Name of the mask, a key of `mask_columns`."""
    value: int = Field(ge=0, le=255)
    """Mask value that shows the class."""
    min_pixels: int = Field(default=1, ge=1)
    """Pixels of that value from which the class counts as present. By default one pixel is
    enough."""


@dataclass(frozen=True)
class Labelled:
    """What a Parquet file says of its images: its row groups as (rows, bytes), and its labels.

    `labels` is None where the source has no such column. `names` are those of Hugging Face's
    ClassLabel, where they count.
    """

    groups: list[tuple[int, int]]
    labels: pa.Array | None
    names: list[str]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(rows for rows, _ in self.groups)


class ParquetFiles(SourceConfig):
    """Encoded images, labels and masks in columns of Parquet files."""

    kind: Literal["parquet"] = "parquet"
    """Encoded images, labels and masks in Parquet files."""
    path: str = "."
    """Folder or URI that the patterns start from; a relative one starts from `data.root`."""
    train: str | tuple[str, ...] | None = None
    """Pattern, or list of patterns, of the train split's files below `path`, such as
    `data/train-*.parquet`. Left out, the source has no such split."""
    val: str | tuple[str, ...] | None = None
    """Pattern, or list of patterns, of the val split's files below `path`. Left out, the source
    has no such split."""
    image: str = "image"
    """Column of encoded images: bytes, or a struct with a field `bytes`, as in Hugging Face's
    data sets, whose usual name is the default."""
    class_column: str | None = "wnid"
    """Column of labels, one for each image or a list of them; null where there are only masks.
    The default is for files labelled by WordNet id."""
    class_ids: ClassIds = None
    """Class id of each label. `imagenet` maps 0 to 999 to WordNet ids. Left out, a whole number
    has the name that Hugging Face's `ClassLabel` in the file gives it, and any other label is its
    own class id. Images of other labels are counted as images of no task."""
    mask_columns: dict[str, str] = Field(default={})
    """Column of encoded masks by the name of the mask."""
    presence: dict[str, Presence] = Field(default={})
    """Classes that are read from masks, by name: an image gets the class id `<name>` or `no
    <name>`. Listing then reads every mask once."""

    @model_validator(mode="after")
    def _presence_names_masks(self) -> ParquetFiles:
        for name, found in self.presence.items():
            if found.mask not in self.mask_columns:
                raise ValueError(
                    f"presence.{name}.mask: {found.mask!r} is no key of mask_columns "
                    f"({', '.join(self.mask_columns) or 'none'})"
                )
        return self

    @property
    def mask_names(self) -> tuple[str, ...]:
        return tuple(self.mask_columns)

    def listing(self, root: str, split: str) -> pa.Table:
        labels = Labels(self.class_ids)
        files, known = self._places(root, split), self._labelled(root, split)
        seen = _of_each(self._presence, files) if self.presence else [[]] * len(files)
        parts = [
            self._file_listing(path, where, about, present, labels)
            for (path, where), about, present in zip(files.items(), known, seen, strict=True)
        ]
        table = pa.concat_tables([references([], [], [], [], []), *parts])
        return with_notes(table, [labels.note()])

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        files: dict[str, dict[int, list[int]]] = {}  # rows come in listing order: by group
        columns = (references[name].to_pylist() for name in ("path", "position", "row"))
        for path, position, row in zip(*columns, strict=True):
            files.setdefault(path, {}).setdefault(position, []).append(row)
        for path, groups in files.items():
            with _open(join(join(root, self.path), path)) as file:  # and its footer read, once
                for position, rows in groups.items():
                    yield from self._read_rows(file, position, rows)

    def state(self, root: str, split: str) -> Iterator[str]:
        """Yields a line for each file: path, bytes, row groups, a hash of all labels and masks.

        Labels and masks are read in full, since others may have the same size. Images are not read.
        """
        known = self._labelled(root, split)
        masks = _of_each(self._mask_hashes, self._places(root, split))
        for (path, size), about, hashes in zip(self.files(root, split), known, masks, strict=True):
            if about.labels is not None and self.class_column is not None:
                hashes = {**hashes, self.class_column: _hash(cells(about.labels))}
            labels = digest(hashes[name] for name in sorted(hashes))
            declared = f"\t{json.dumps(about.names)}" if about.names else ""
            yield f"{path}\t{size}\t{about.groups}\t{labels}{declared}"
        presence = {name: found.model_dump() for name, found in self.presence.items()}
        read = [self.image, self.class_column, self.class_ids, self.mask_columns]
        yield json.dumps([*read, presence] if presence else read)

    def files(self, root: str, split: str) -> list[tuple[str, int]]:
        """Returns (path below self.path, bytes) of the split's files, sorted.

        Raises DataError where a pattern matches none.
        """
        patterns = self.train if split == "train" else self.val
        return files_of_split(self, join(root, self.path), patterns, split)

    def _places(self, root: str, split: str) -> dict[str, str]:
        """Returns the full address of each of the split's files by its path."""
        home = join(root, self.path)
        return {path: join(home, path) for path, _ in self.files(root, split)}

    def _labelled(self, root: str, split: str) -> list[Labelled]:
        """Returns what each of the split's files says of its images, read once in one_look()."""
        key = ("labels", self.model_dump_json(), root, split)
        return remembered(key, lambda: _of_each(self._labels_of, self._places(root, split)))

    def _labels_of(self, where: str) -> Labelled:
        """Reads the footer and the labels of a file."""
        with _open(where) as file:
            _need_columns(self, where, file.schema_arrow)
            groups = [
                file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)
            ]
            labels = None
            if self.class_column is not None:
                column = file.read([self.class_column])[self.class_column]
                labels = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
            return Labelled(
                [(group.num_rows, group.total_byte_size) for group in groups],
                labels,
                self._class_label_names(file.schema_arrow),
            )

    def _file_listing(
        self, path: str, where: str, about: Labelled, present: list[list[str]], known: Labels
    ) -> pa.Table:
        """Returns the listing of a file; `present` are the classes that its masks show by row."""
        by_label = {str(n): str(class_id_of(name)) for n, name in enumerate(about.names)} or None
        if about.labels is None:
            classes = pa.array([[]], CLASS_IDS).take(pa.array(np.zeros(about.rows, np.int64)))
        else:
            column = f"{where}, column '{self.class_column}'"
            classes = known.column(about.labels, column, by_label)
        if present:
            both = zip(cells(classes), present, strict=True)
            classes = pa.array((own + shown for own, shown in both), CLASS_IDS)
        sizes = [rows for rows, _ in about.groups]
        paths = pa.repeat(pa.scalar(path, pa.string()), about.rows)
        numbers = pa.array(np.arange(about.rows)).cast(pa.string())
        return references(
            pc.binary_join_element_wise(paths, numbers, ":"),
            classes,
            paths,
            pa.array(np.repeat(np.arange(len(sizes)), sizes)),
            pa.array(np.concatenate([np.arange(0), *map(np.arange, sizes)])),
        )

    def _mask_hashes(self, where: str) -> dict[str, str]:
        """Returns a sha256 over the cells of each column of masks."""
        hashes = {name: hashlib.sha256() for name in self.mask_columns.values()}
        if hashes:
            with _open(where) as file:
                for batch in file.iter_batches(READ_ROWS, columns=list(hashes)):
                    for name, total in hashes.items():
                        total.update(_lines(batch[name].to_pylist()))
        return {name: total.hexdigest() for name, total in hashes.items()}

    def _presence(self, where: str) -> list[list[str]]:
        """Returns the classes that the masks of each row of a file show.

        A mask that is missing or does not decode shows neither that a class is present nor that it
        is absent.
        """
        names = sorted({found.mask for found in self.presence.values()})
        columns = [self.mask_columns[name] for name in names]
        with _open(where) as file:
            return [
                self._classes_shown(
                    {
                        name: mask_values(_encoded(row[column]) or b"")
                        for name, column in zip(names, columns, strict=True)
                    }
                )
                for batch in file.iter_batches(READ_ROWS, columns=columns)
                for row in batch.to_pylist()
            ]

    def _classes_shown(self, masks: dict[str, NDArray[np.int64] | Rejection]) -> list[str]:
        return [
            name if (values == found.value).sum() >= found.min_pixels else f"no {name}"
            for name, found in self.presence.items()
            if not isinstance(values := masks[found.mask], Rejection)
        ]

    def _class_label_names(self, schema: pa.Schema) -> list[str]:
        """Returns the class names that Hugging Face's metadata declares, [] if they do not count.

        They count where the file has whole numbers and the source no `class_ids`.
        """
        if self.class_column is None or self.class_ids is not None:
            return []
        kind = schema.field(self.class_column).type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind):
            kind = kind.value_type
        return class_label_names(schema, self.class_column) if pa.types.is_integer(kind) else []

    def _read_rows(self, file: pq.ParquetFile, group: int, rows: list[int]) -> Iterator[RawRow]:
        wanted, start = set(rows), 0
        columns = [self.image, *self.mask_columns.values()]
        for batch in file.iter_batches(READ_ROWS, row_groups=[group], columns=columns):
            for offset in range(batch.num_rows):
                if start + offset in wanted:
                    yield self._row({name: batch[name][offset].as_py() for name in columns})
            start += batch.num_rows
            if start > rows[-1]:
                return

    def _row(self, values: dict[str, Any]) -> RawRow:
        image = _encoded(values[self.image])
        masks = {
            name: mask
            for name, column in self.mask_columns.items()
            if (mask := _encoded(values[column]))
        }
        return RawRow(image or b"", masks, error="" if image is not None else "no image in the row")


def class_label_names(schema: pa.Schema, column: str) -> list[str]:
    """Returns the names of a column's `ClassLabel` in Hugging Face's metadata, [] if it has none.

    The position of a name is its label.
    """
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        feature = about["info"]["features"][column]
        while isinstance(feature, list) or "feature" in feature:  # a sequence of labels
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        names = feature["names"] if feature["_type"] == "ClassLabel" else []
    except (KeyError, IndexError, TypeError, ValueError):
        return []
    return [str(name) for name in names]


def parquet_columns(path: str) -> list[str]:
    """Returns the column names of one Parquet file. Raises DataError where it is none."""
    with _open(path) as file:
        names: list[str] = file.schema_arrow.names
    return names


def _of_each(read: Callable[[str], Value], files: Mapping[str, str]) -> list[Value]:
    """Returns read(address) of each file, in their order; threads wait for the network."""
    return list(in_threads(read, files.values()))


def _hash(values: Iterator[Any]) -> str:
    """Returns a sha256 over cells."""
    total = hashlib.sha256()
    for value in values:
        total.update(_lines([value]))
    return total.hexdigest()


def _lines(values: Sequence[Any]) -> bytes:
    return "".join(f"{value!r}\n" for value in values).encode()


@contextmanager
def _open(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a Parquet file. Raises DataError where it is none, is damaged or may not be read."""
    store, inner = filesystem(path)
    try:
        with pq.ParquetFile(inner, filesystem=store) as file:
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _need_columns(source: ParquetFiles, where: str, schema: pa.Schema) -> None:
    wanted = [source.image, *source.mask_columns.values()]
    if source.class_column is not None:
        wanted.append(source.class_column)
    absent = [name for name in wanted if name not in schema.names]
    if absent:
        raise DataError(
            f"{where} has no column '{absent[0]}'; it has {', '.join(schema.names)}. "
            f"Set image, class_column or mask_columns of source '{source.source_name}'"
        )


def _encoded(value: Any) -> bytes | None:
    """Returns the bytes of an image cell: plain bytes, or those of Hugging Face's {bytes, path}."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if value is None or isinstance(value, bytes):
        return value
    raise DataError(f"an image column must hold encoded bytes, got {type(value).__name__}")
