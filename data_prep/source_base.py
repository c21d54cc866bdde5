"""What every image source is: its settings, its listing, its rows. Holds no particular source."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

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


class DataError(ValueError):
    """A user's mistake found in data or data settings: what came, what is allowed, what to do."""

    exit_code = 2


@dataclass(frozen=True)
class RawRow:
    """One image as the source holds it: encoded bytes, and encoded masks by name. A row that could
    not be read at all has no image and says why."""

    image: bytes
    masks: Mapping[str, bytes]
    error: str = ""


class SourceConfig(BaseModel, ABC):
    """Settings of a source. A subclass adds `kind` and says how its images are listed and read.

    `root` is the absolute folder or URI that relative paths start from; `split` is train or val.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    name: str | None = None  # default: the kind; needed where two sources have one kind

    @property
    def source_name(self) -> str:
        return self.name or self.kind

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Masks a row of this source may carry."""
        return ()

    def declared_classes(self, task: str) -> tuple[str, ...]:
        """Class ids this source declares for the task of that name; () if it declares none."""
        return ()

    @abstractmethod
    def listing(self, root: str, split: str) -> pa.Table:
        """References to all rows of the split (schema REFERENCES), cheap, in a fixed order; empty
        if this source has no such split; DataError if its files are missing."""

    @abstractmethod
    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        """The rows referred to, in order. Runs inside Ray tasks."""

    @abstractmethod
    def state(self, root: str, split: str) -> Iterator[str]:
        """Lines that change when the split's files do: relative names and sizes, never dates."""


def missing(source: SourceConfig, what: str, where: str) -> DataError:
    """The error for files that are not where the settings say."""
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
    """A listing from columns of equal length."""
    return pa.table([source_ids, class_ids, paths, positions, rows], schema=REFERENCES)


def digest(lines: Iterator[str]) -> str:
    """sha256 over lines, hex."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode())
        total.update(b"\n")
    return total.hexdigest()
