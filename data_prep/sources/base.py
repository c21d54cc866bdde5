"""What every image source has: settings, a listing, rows. Holds no particular source."""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, model_validator

from data_prep.errors import DataError
from data_prep.sources.remembering import remembered
from data_prep.storage import is_uri, join, matching_files, uri_fault

NOTES = b"notes"  # key in the metadata of a listing's schema
SPLIT_PLACES = ("train", "val", "train_folder", "val_folder")
"""Fields of some sources that say where a split lies."""
CELLS = 65_536  # of a column that are Python objects at once
REPEATED = pa.dictionary(pa.int32(), pa.string())
"""Text that many rows have in common: each is stored once, a row has its number."""
# A listing refers to images without reading them. `path` is relative to the source's own folder;
# `position` is what the source needs beside it: the row group of a Parquet file, the index of a
# generated image, 0 for an image file. `row` is the row within a row group.
REFERENCES = pa.schema(
    [
        ("source_id", pa.string()),
        ("class_ids", pa.list_(REPEATED)),
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

    @model_validator(mode="after")
    def _places_are_plain_uris(self) -> SourceConfig:
        for name in ("path", "train_labels", "val_labels", *SPLIT_PLACES):
            value = getattr(self, name, None)
            for place in (value,) if isinstance(value, str) else value or ():
                # The last part of a split's place is a pattern, which may have a `?`.
                folder = place.rpartition("/")[0] if name in SPLIT_PLACES else place
                if is_uri(folder) and (fault := uri_fault(folder)):
                    raise ValueError(f"{name}: {fault}")
        return self

    @model_validator(mode="after")
    def _splits_are_two_places_below_the_source(self) -> SourceConfig:
        for names in (("train", "val"), ("train_folder", "val_folder")):
            train, val = (getattr(self, name, None) for name in names)
            if train and train == val:
                raise ValueError(
                    f"{names[0]} and {names[1]} are both {train!r}, so the figures would come from "
                    f"the training images: give {names[1]} another place, or set it to null and "
                    "data.val_fraction to a share of the images, such as 0.2"
                )
            for name, value in zip(names, (train, val), strict=True):
                for each in (value,) if isinstance(value, str) else value or ():
                    if is_uri(each) or posixpath.isabs(each):
                        folder, _, last = each.rpartition("/")
                        raise ValueError(
                            f"{name} is {each!r}, and it starts from the source's `path`: set "
                            f"path to {folder or '/'!r} and {name} to {last!r}"
                        )
        return self

    @property
    def source_name(self) -> str:
        """Name of the source, or its kind where it has none."""
        return self.name or self.kind

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of the masks that a row of this source may carry."""
        return ()

    @property
    def may_be_mirrored(self) -> bool:
        """Whether a mirrored image has the same labels, as far as the source knows."""
        return True

    @property
    def declares_classes(self) -> bool:
        """Whether `declared_classes` knows the classes of tasks before anything is listed."""
        return False

    def declared_classes(self, task: str) -> tuple[str, ...]:
        """Returns the class ids the source declares for the task of that name, () if none."""
        return ()

    @abstractmethod
    def listing(self, root: str, split: str) -> pa.Table:
        """Returns references to all rows of the split (schema REFERENCES), in a fixed order.

        Opens no image. The table is empty where the source has no such split. What it leaves out
        is said in sentences (`with_notes`). Raises DataError where files are missing.
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


def missing(source: SourceConfig, what: str, where: str, *, split: str = "") -> DataError:
    """Returns the error for files, of a split or of no particular one, that are not there."""
    other = (
        ". Without a val split, set the source's val to null and data.val_fraction to a share of "
        "the images, such as 0.2"
    )
    return DataError(
        f"source '{source.source_name}' ({source.kind}): no {what} at {where}; "
        "set data.root, or the source's path, to where the images are"
        f"{other if split == 'val' else ''}"
    )


def listing_of(source: SourceConfig, root: str, split: str) -> pa.Table:
    """Returns `source.listing(root, split)`, made once within one_look()."""
    key = ("listing", source.model_dump_json(), root, split)
    return remembered(key, lambda: source.listing(root, split))


def files_of_split(
    source: SourceConfig, home: str, patterns: str | tuple[str, ...] | None, split: str
) -> list[tuple[str, int]]:
    """Returns (path below `home`, bytes) of the files that match the patterns, sorted.

    Within one_look() they are listed once. Raises DataError where a pattern matches none.
    """
    found: dict[str, int] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
        matches = matching(home, pattern)
        if not matches:
            raise missing(source, f"{split} file", join(home, pattern), split=split)
        found.update(matches)
    return sorted(found.items())


def matching(home: str, pattern: str) -> dict[str, int]:
    """Returns `matching_files(home, pattern)`, listed once within one_look()."""
    return remembered(("files", home, pattern), lambda: matching_files(home, pattern))


def class_id_of(label: Any) -> str | None:
    """Returns a label as the text that is its class id, None where it is missing.

    A whole number has no decimals: pandas turns a column of integers with a gap into floats. True
    and false are written as in YAML. Accents are composed, as in the class ids of tasks.
    """
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return None
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    text = label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
    return unicodedata.normalize("NFC", text)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: `1 image`, `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def with_notes(listing: pa.Table, notes: Iterable[str]) -> pa.Table:
    """Returns a listing that carries sentences on what it leaves out. Empty ones are dropped."""
    kept = [note for note in notes if note]
    return listing.replace_schema_metadata({NOTES: json.dumps(kept)} if kept else None)


def notes_of(listing: pa.Table) -> list[str]:
    """Returns the sentences that a listing carries."""
    metadata = listing.schema.metadata or {}
    found: list[str] = json.loads(metadata.get(NOTES, b"[]"))
    return found


def references(
    source_ids: Sequence[str] | pa.Array,
    class_ids: Sequence[Sequence[str]] | pa.Array,
    paths: Sequence[str] | pa.Array,
    positions: Sequence[int] | pa.Array,
    rows: Sequence[int] | pa.Array,
) -> pa.Table:
    """Returns a listing made of columns of equal length: lists, or arrays of the schema's types."""
    return pa.table([source_ids, class_ids, paths, positions, rows], schema=REFERENCES)


def cells(column: pa.Array | pa.ChunkedArray) -> Iterator[Any]:
    """Yields the values of a column. Few of them are Python objects at once."""
    for start in range(0, len(column), CELLS):
        yield from column.slice(start, CELLS).to_pylist()


def values_of(lists: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Returns the values of a column of lists, one behind the other, and the row of each."""
    one = joined(lists)
    return one.flatten(), pc.list_parent_indices(one)


def joined(column: pa.ChunkedArray) -> pa.Array:
    """Returns a column as one array, without a copy if it is one already."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def repeated(text: str, rows: int) -> pa.Array:
    """Returns a column of the same text in each row, of the type REPEATED."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), [text])


def digest(lines: Iterable[str]) -> str:
    """Returns the sha256 over lines, in hex."""
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode())
        total.update(b"\n")
    return total.hexdigest()
