"""What every image source has: settings, a listing, rows. Holds no particular source."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from data_prep.errors import DataError

# A listing refers to images without reading them. `path` is relative to the source's own folder;
# `position` is what the source needs beside it: the row group of a Parquet file, the index of a
# generated image, 0 for an image file. `row` is the row within a row group.
REFERENCES = pa.schema(
    [
        ("source_id", pa.string()),
        ("class_ids", pa.list_(pa.string())),
        ("path", pa.string()),
        ("position", pa.int64()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class RawRow:
    """One image as the source holds it: encoded bytes, and encoded masks by name.

    A row that could not be read has no image; `error` says why.
    """

    image: bytes
    masks: Mapping[str, bytes]
    error: str = ""


class SourceConfig(BaseModel, ABC):
    """Settings of a source. A subclass sets `kind` and says how its images are listed and read.

    In the methods, `root` is the absolute folder or URI that relative paths start from, and `split`
    is train or val.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    """Kind of the source; it decides which other keys there are."""
    name: str | None = None
    """Name of the source in tasks and messages. Left out, it is the kind; two sources of one
    kind need names."""

    @property
    def source_name(self) -> str:
        """Name of the source, or its kind where it has none."""
        return self.name or self.kind

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of the masks that a row of this source may carry."""
        return ()

    def declared_classes(self, task: str) -> tuple[str, ...]:
        """Returns the class ids the source declares for the task of that name, () if none."""
        return ()

    @abstractmethod
    def listing(self, root: str, split: str) -> pa.Table:
        """Returns references to all rows of the split (schema REFERENCES), in a fixed order.

        Opens no image. The table is empty where the source has no such split. Raises DataError
        where files are missing.
        """

    @abstractmethod
    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        """Yields the rows referred to, in order. Runs in the tasks that clean images."""

    @abstractmethod
    def state(self, root: str, split: str) -> Iterator[str]:
        """Yields lines that change when the split's images or labels do.

        They hold relative names, sizes and hashes. They hold no dates and no absolute paths, so a
        copy has the same lines. Called for every plan, so reading all images is too dear.
        """


def missing(source: SourceConfig, what: str, where: str) -> DataError:
    """Returns the error for files that are not where the settings say."""
    return DataError(
        f"source '{source.source_name}' ({source.kind}): no {what} at {where}; "
        "set data.root, or the source's path, to where the images are"
    )


def references(
    source_ids: Sequence[str],
    class_ids: Sequence[Sequence[str]],
    paths: Sequence[str],
    positions: Sequence[int],
    rows: Sequence[int],
) -> pa.Table:
    """Returns a listing made of columns of equal length."""
    return pa.table([source_ids, class_ids, paths, positions, rows], schema=REFERENCES)


def digest(lines: Iterable[str]) -> str:
    """Returns the sha256 over lines, in hex."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode())
        total.update(b"\n")
    return total.hexdigest()
