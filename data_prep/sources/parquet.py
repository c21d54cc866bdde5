"""The `parquet` source: encoded images and labels in Parquet files, locally or below a URI."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import posixpath
from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel, Field, model_validator

from data_prep.checks import Rejection, mask_values
from data_prep.errors import DataError
from data_prep.imagenet import imagenet_wnids
from data_prep.sources.base import RawRow, SourceConfig, digest, missing, references
from data_prep.storage import filesystem, join

READ_ROWS = 64
LABEL_ROWS = 65_536  # read at once where there are no masks


class Presence(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """A class of an image that is read from its mask: present where enough pixels have a value."""

    mask: str
    """Name of the mask, a key of `mask_columns`."""
    value: int = Field(ge=0, le=255)
    """Mask value that shows the class."""
    min_pixels: int = Field(default=1, ge=1)
    """Pixels of that value from which the class counts as present. By default one pixel is
    enough."""


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
    class_ids: Literal["imagenet"] | dict[str, str] | None = None
    """Class id of each label. `imagenet` maps 0 to 999 to WordNet ids. Left out, a label is its
    own class id."""
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
        return pa.concat_tables(
            [references([], [], [], [], [])]
            + [self._file_listing(root, path) for path, _ in self.files(root, split)]
        )

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        groups: dict[tuple[str, int], list[int]] = {}  # rows come in listing order: by group
        for path, position, row in zip(
            references["path"].to_pylist(),
            references["position"].to_pylist(),
            references["row"].to_pylist(),
            strict=True,
        ):
            groups.setdefault((path, position), []).append(row)
        for (path, position), rows in groups.items():
            yield from self._read_rows(join(join(root, self.path), path), position, rows)

    def state(self, root: str, split: str) -> Iterator[str]:
        """Yields a line for each file: path, bytes, row groups, a hash of all labels and masks.

        Labels and masks are read in full, since others may have the same size. Images are not read.
        """
        for path, size in self.files(root, split):
            where = join(join(root, self.path), path)
            with _open(where) as file:
                _need_columns(self, where, file.schema_arrow)
                footer = file.metadata
                groups = [
                    (footer.row_group(index).num_rows, footer.row_group(index).total_byte_size)
                    for index in range(footer.num_row_groups)
                ]
                labels = self._labels_hash(file)
            yield f"{path}\t{size}\t{groups}\t{labels}"
        presence = {name: found.model_dump() for name, found in self.presence.items()}
        read = [self.image, self.class_column, self.class_ids, self.mask_columns]
        yield json.dumps([*read, presence] if presence else read)

    def files(self, root: str, split: str) -> list[tuple[str, int]]:
        """Returns (path below self.path, bytes) of the split's files, sorted.

        Raises DataError where a pattern matches none.
        """
        patterns = self.train if split == "train" else self.val
        if patterns is None:
            return []
        home = join(root, self.path)
        found: dict[str, int] = {}
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            matches = matching_files(home, pattern)
            if not matches:
                raise missing(self, f"{split} file", join(home, pattern))
            found.update(matches)
        return sorted(found.items())

    def _file_listing(self, root: str, path: str) -> pa.Table:
        where = join(join(root, self.path), path)
        with _open(where) as file:
            _need_columns(self, where, file.schema_arrow)
            sizes = [
                file.metadata.row_group(index).num_rows
                for index in range(file.metadata.num_row_groups)
            ]
            if self.class_column is None:
                labels: list[Any] = [None] * sum(sizes)
            else:
                labels = file.read([self.class_column])[self.class_column].to_pylist()
            seen = self._presence(file)
        positions = [index for index, size in enumerate(sizes) for _ in range(size)]
        rows = [row for size in sizes for row in range(size)]
        return references(
            [f"{path}:{number}" for number in range(len(labels))],
            [
                self._class_ids(label, where) + present
                for label, present in zip(labels, seen or [[]] * len(labels), strict=True)
            ],
            [path] * len(labels),
            positions,
            rows,
        )

    def _labels_hash(self, file: pq.ParquetFile) -> str:
        """Returns a sha256 over the cells of the columns of labels and masks."""
        columns = list(self.mask_columns.values())
        rows = READ_ROWS if columns else LABEL_ROWS
        if self.class_column is not None:
            columns.append(self.class_column)
        hashes = {name: hashlib.sha256() for name in sorted(columns)}
        for batch in file.iter_batches(rows, columns=list(hashes)):
            for name, total in hashes.items():
                total.update("".join(f"{cell!r}\n" for cell in batch[name].to_pylist()).encode())
        return digest(each.hexdigest() for each in hashes.values())

    def _presence(self, file: pq.ParquetFile) -> list[list[str]]:
        """Returns the classes that the masks of each row show; [] where none are asked for.

        A mask that is missing or does not decode shows neither that a class is present nor that it
        is absent.
        """
        if not self.presence:
            return []
        names = sorted({found.mask for found in self.presence.values()})
        columns = [self.mask_columns[name] for name in names]
        rows = []
        for batch in file.iter_batches(READ_ROWS, columns=columns):
            for row in batch.to_pylist():
                masks = {
                    name: mask_values(_encoded(row[column]) or b"")
                    for name, column in zip(names, columns, strict=True)
                }
                rows.append(
                    [
                        name if (values == found.value).sum() >= found.min_pixels else f"no {name}"
                        for name, found in self.presence.items()
                        if not isinstance(values := masks[found.mask], Rejection)
                    ]
                )
        return rows

    def _class_ids(self, label: Any, where: str) -> list[str]:
        if label is None:
            return []
        if isinstance(label, list):
            return [class_id for one in label for class_id in self._class_ids(one, where)]
        if self.class_ids is None:
            return [str(label)]
        if self.class_ids == "imagenet":
            wnids = imagenet_wnids()
            if isinstance(label, int) and 0 <= label < len(wnids):
                return [wnids[label]]
            raise DataError(
                f"{where}: label {label!r} in column '{self.class_column}' is no ImageNet-1k index "
                "(0-999); give class_ids a mapping or leave it out"
            )
        if str(label) not in self.class_ids:
            raise DataError(
                f"{where}: label {label!r} in column '{self.class_column}' is not in class_ids "
                f"({', '.join(sorted(self.class_ids)[:5])}, ...)"
            )
        return [self.class_ids[str(label)]]

    def _read_rows(self, where: str, group: int, rows: list[int]) -> Iterator[RawRow]:
        wanted, start = set(rows), 0
        columns = [self.image, *self.mask_columns.values()]
        with _open(where) as file:
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


def matching_files(home: str, pattern: str) -> dict[str, int]:
    """Returns the bytes of the files below `home` that match the pattern, by their path."""
    store, inner = filesystem(home)
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    start = posixpath.join(inner, posixpath.dirname(fixed)).rstrip("/")
    selector = fs.FileSelector(start, recursive="/" in pattern[len(fixed) :], allow_not_found=True)
    found = {}
    for entry in store.get_file_info(selector):
        path = entry.path[len(inner) :].lstrip("/")
        if entry.type == fs.FileType.File and fnmatch.fnmatchcase(path, pattern):
            found[path] = entry.size
    return found


def parquet_columns(path: str) -> list[str]:
    """Returns the column names of one Parquet file. Raises DataError where it is none."""
    with _open(path) as file:
        names: list[str] = file.schema_arrow.names
    return names


def _open(path: str) -> pq.ParquetFile:
    store, inner = filesystem(path)
    try:
        return pq.ParquetFile(inner, filesystem=store)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is no readable Parquet file: {error}") from error


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
