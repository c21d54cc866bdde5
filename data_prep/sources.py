"""All image sources: the dict of kinds, the `auto` source, fingerprints, a source for a bare path.

A new kind is one file like sources_shapes.py and its name in SOURCES and AnySource, below.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
from pyarrow import fs
from pydantic import Field

from data_prep.source_base import DataError, RawRow, SourceConfig, digest, missing
from data_prep.sources_folder import ImageFolder
from data_prep.sources_parquet import ParquetFiles, matching_files, parquet_columns
from data_prep.sources_shapes import Shapes
from data_prep.storage import absolute, filesystem, join

if TYPE_CHECKING:
    from data_prep.schema import DataConfig, TaskTable

CLASS_COLUMNS = ("wnid", "label", "class", "class_id", "label_name")


class Auto(SourceConfig):
    """Parquet files if the patterns match any below `path`, image folders otherwise."""

    kind: Literal["auto"] = "auto"
    path: str = "."
    train: str | tuple[str, ...] | None = "train*.parquet"  # Parquet patterns
    val: str | tuple[str, ...] | None = "val*.parquet"
    image: str = "image"
    class_column: str | None = "wnid"
    class_ids: Literal["imagenet"] | dict[str, str] | None = None
    mask_columns: dict[str, str] = Field(default={})
    train_folder: str | None = "train"  # image folders
    val_folder: str | None = "val"
    val_labels: str | None = None

    @property
    def mask_names(self) -> tuple[str, ...]:
        return tuple(self.mask_columns)

    def listing(self, root: str, split: str) -> pa.Table:
        return self.found(root).listing(root, split)

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        return self.found(root).read(root, references)

    def state(self, root: str, split: str) -> Iterator[str]:
        return self.found(root).state(root, split)

    def parquet(self) -> ParquetFiles:
        """The same settings as a Parquet source."""
        own = self.model_dump(include=set(ParquetFiles.model_fields) - {"kind"})
        return ParquetFiles(**(own | {"name": self.source_name}))

    def found(self, root: str) -> ParquetFiles | ImageFolder:
        """The source that is there; DataError if neither is."""
        home = join(root, self.path)
        patterns: list[str] = []
        for setting in (self.train, self.val):
            patterns += (setting,) if isinstance(setting, str) else setting or ()
        if any(matching_files(home, pattern) for pattern in patterns):
            return self.parquet()
        for folder in (self.train_folder, self.val_folder):
            store, inner = filesystem(join(home, folder or "."))
            if folder and store.get_file_info(inner).type == fs.FileType.Directory:
                return ImageFolder(
                    name=self.source_name,
                    path=self.path,
                    train=self.train_folder,
                    val=self.val_folder,
                    val_labels=self.val_labels,
                )
        looked = ", ".join([*patterns, f"{self.train_folder}/", f"{self.val_folder}/"])
        raise missing(self, f"Parquet file or image folder ({looked})", home)


def source_fingerprint(data: DataConfig, table: TaskTable) -> str:
    """sha256 over what the sources hold (relative names and sizes) and the class ids asked of them.

    Cheap: no image is read. The same files in another folder or with other dates give the same."""
    root = absolute(data.root)

    def lines() -> Iterator[str]:
        yield from table.classes
        for source in data.sources:
            for split in ("train", "val"):
                yield f"{source.source_name}\t{split}"
                yield from source.state(root, split)

    return digest(lines())


def source_for_path(path: str, like: DataConfig) -> SourceConfig:
    """A source with one split, `val`, for images to be scored.

    `path` is a Parquet file, a folder or pattern of them, or a folder of images by class (its `val`
    folder if it has one). Column names are those of `like`'s Parquet source where the file has
    them, else `image` and the first of CLASS_COLUMNS. DataError if nothing usable is there."""
    where = absolute(path)
    folder, _, last = where.rpartition("/")
    store, inner = filesystem(where)
    if store.get_file_info(inner).type == fs.FileType.Directory:
        parquet = matching_files(where, "*.parquet")
        if not parquet:
            has_val = store.get_file_info(f"{inner}/val").type == fs.FileType.Directory
            return ImageFolder(name="scored", path=where, train=None, val="val" if has_val else ".")
        folder, last = where, "*.parquet"
    else:
        parquet = matching_files(folder, last)
    if not parquet:
        raise DataError(f"nothing to score at {where}: give Parquet files or a folder of images")
    return _parquet_like(folder, last, parquet_columns(join(folder, min(parquet))), like)


def _parquet_like(folder: str, pattern: str, columns: list[str], like: DataConfig) -> ParquetFiles:
    model = next(
        (
            source.parquet() if isinstance(source, Auto) else source
            for source in like.sources
            if isinstance(source, Auto | ParquetFiles)
        ),
        ParquetFiles(),
    )
    masks = {name: column for name, column in model.mask_columns.items() if column in columns}
    candidates = (model.class_column, *CLASS_COLUMNS)
    label = next((name for name in candidates if name and name in columns), None)
    if label is None and not masks:
        raise DataError(
            f"{folder}/{pattern} has no column of labels; it has {', '.join(columns)}, "
            f"one of {', '.join(CLASS_COLUMNS)} is needed"
        )
    return ParquetFiles(
        name="scored",
        path=folder,
        val=pattern,
        image=model.image if model.image in columns else "image",
        class_column=label,
        class_ids=model.class_ids if label == model.class_column else None,
        mask_columns=masks,
    )


SOURCES: dict[str, type[SourceConfig]] = {
    "image_folder": ImageFolder,
    "parquet": ParquetFiles,
    "auto": Auto,
    "shapes": Shapes,
}
AnySource = Annotated[ImageFolder | ParquetFiles | Auto | Shapes, Field(discriminator="kind")]
