"""What looks at all kinds of sources: a config's fingerprint, and a source for a bare path."""

from __future__ import annotations

from collections.abc import Iterator

from pyarrow import fs

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import TaskTable
from data_prep.sources.base import SourceConfig, digest
from data_prep.sources.folder import ImageFolder
from data_prep.sources.kinds import Auto
from data_prep.sources.parquet import ParquetFiles, matching_files, parquet_columns
from data_prep.storage import absolute, filesystem, join

CLASS_COLUMNS = ("wnid", "label", "class", "class_id", "label_name")


def source_fingerprint(data: DataConfig, table: TaskTable) -> str:
    """Returns a sha256 over what the sources hold and the wanted class ids.

    It covers relative names, sizes and labels; see `state` of each source for what is read beside
    them. The same files in another folder or with other dates give the same.
    """
    root = absolute(data.root)

    def lines() -> Iterator[str]:
        yield from table.classes
        for source in data.sources:
            for split in ("train", "val"):
                yield f"{source.source_name}\t{split}"
                yield from source.state(root, split)

    return digest(lines())


def source_for_path(path: str, like: DataConfig) -> SourceConfig:
    """Returns a source with one split, `val`, for images to be scored.

    `path` is a Parquet file, a folder or pattern of them, or a folder of images by class (its `val`
    folder if it has one). Column names are those of `like`'s Parquet source where the file has
    them, else `image` and the first of CLASS_COLUMNS. Raises DataError where there is nothing to
    score.
    """
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
    """Returns a source for Parquet files of these columns; settings of `like` where they fit."""
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
            f"{folder}/{pattern} has no column of labels; it has {', '.join(columns)}. "
            f"Name the column of labels one of {', '.join(CLASS_COLUMNS)}"
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
