"""The `auto` source: Parquet files or image folders, whichever are there."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Annotated, Literal

import pyarrow as pa
from pyarrow import fs
from pydantic import Field

from data_prep.sources.base import RawRow, SourceConfig, matching, missing
from data_prep.sources.class_ids import ClassIds
from data_prep.sources.folder import ImageFolder
from data_prep.sources.parquet import ParquetFiles
from data_prep.sources.remembering import remembered
from data_prep.sources.shapes import Shapes
from data_prep.sources.webdataset import WebDataset
from data_prep.storage import join, kind_of


class Auto(SourceConfig):
    """Parquet files where the patterns match any below `path`, image folders otherwise."""

    kind: Literal["auto"] = "auto"
    """Parquet files where the patterns match any below `path`, image folders otherwise."""
    path: str = "."
    """Folder or URI that patterns and folders start from; a relative one starts from
    `data.root`."""
    train: str | tuple[str, ...] | None = "train*.parquet"
    """Parquet: pattern, or list of patterns, of the train split's files below `path`; null
    where there is no such split."""
    val: str | tuple[str, ...] | None = "val*.parquet"
    """Parquet: pattern, or list of patterns, of the val split's files below `path`; null where
    there is no such split."""
    image: str = "image"
    """Parquet: column of encoded images."""
    class_column: str | None = "wnid"
    """Parquet: column of labels; null where there are only masks. The default is for files
    labelled by WordNet id."""
    class_ids: ClassIds = None
    """Parquet: class id of each label; `imagenet` maps 0 to 999 to WordNet ids. Left out, the
    names of a Hugging Face `ClassLabel` count, or a label is its own class id."""
    mask_columns: dict[str, str] = Field(default={})
    """Parquet: column of encoded masks by the name of the mask."""
    train_folder: str | None = "train"
    """Image folders: folder of the train split below `path`; null where there is none."""
    val_folder: str | None = "val"
    """Image folders: folder of the val split below `path`; null where there is none."""
    val_labels: str | None = None
    """Image folders: label file, below `path`, of a val folder that is not divided by class."""

    @property
    def mask_names(self) -> tuple[str, ...]:
        return tuple(self.mask_columns)

    def listing(self, root: str, split: str) -> pa.Table:
        return self.found(root).listing(root, split)

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        paths = references["path"]  # of one kind; no image file matches where Parquet files do not
        is_parquet = any(fnmatch.fnmatchcase(paths[0].as_py(), each) for each in self._patterns)
        return (self.parquet() if is_parquet else self._folder()).read(root, references)

    def state(self, root: str, split: str) -> Iterator[str]:
        return self.found(root).state(root, split)

    @property
    def _patterns(self) -> list[str]:
        patterns: list[str] = []
        for setting in (self.train, self.val):
            patterns += (setting,) if isinstance(setting, str) else setting or ()
        return patterns

    def _folder(self) -> ImageFolder:
        return ImageFolder(
            name=self.source_name,
            path=self.path,
            train=self.train_folder,
            val=self.val_folder,
            val_labels=self.val_labels,
        )

    def parquet(self) -> ParquetFiles:
        """Returns a Parquet source with the same settings."""
        own = self.model_dump(include=set(ParquetFiles.model_fields) - {"kind"})
        return ParquetFiles(**(own | {"name": self.source_name}))

    def found(self, root: str) -> ParquetFiles | ImageFolder:
        """Returns the source whose files exist. Raises DataError where neither's do."""
        return remembered(("auto", self.model_dump_json(), root), lambda: self._found(root))

    def _found(self, root: str) -> ParquetFiles | ImageFolder:
        home = join(root, self.path)
        if any(matching(home, pattern) for pattern in self._patterns):
            return self.parquet()
        for folder in (self.train_folder, self.val_folder):
            if folder and kind_of(join(home, folder)) == fs.FileType.Directory:
                return self._folder()
        looked = ", ".join([*self._patterns, f"{self.train_folder}/", f"{self.val_folder}/"])
        raise missing(self, f"Parquet file or image folder ({looked})", home)


Images = Annotated[
    ImageFolder | ParquetFiles | Auto | Shapes | WebDataset, Field(discriminator="kind")
]
"""The sources that hold images of their own."""
