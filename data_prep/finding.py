"""What looks at all kinds of sources: a config's fingerprint, and a source for a bare path."""

from __future__ import annotations

from collections.abc import Iterator

from pyarrow import fs

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.manifest import TaskTable
from data_prep.sources.auto import Auto
from data_prep.sources.base import SourceConfig, digest
from data_prep.sources.folder import ImageFolder, is_image
from data_prep.sources.parquet import ParquetFiles, parquet_columns
from data_prep.sources.webdataset import WebDataset
from data_prep.storage import (
    absolute,
    files_below,
    folders_in,
    join,
    kind_of,
    matching_files,
)

PATTERNS = ("*.parquet", "*.tar")
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


def source_for_path(path: str, like: DataConfig, *, labels: str | None = None) -> SourceConfig:
    """Returns a source with one split, `val`, for images to be scored.

    `path` is a Parquet or tar file, a folder or pattern of them, or a folder of images (its `val`
    folder if it has one): by class, or with the label file `labels`. Settings of columns and labels
    are those of `like`'s source of the same kind where they fit. Raises DataError where there is
    nothing to score, and where images have no class.
    """
    where = absolute(path)
    folder, _, last = where.rpartition("/")
    if kind_of(where) == fs.FileType.Directory:
        folder = where
        last = next((each for each in PATTERNS if matching_files(where, each)), "")
        if not last or labels is not None:
            return _folder(where, labels)
    elif labels is not None:
        raise DataError(f"{where} is no folder: a label file names the images of a folder")
    found = matching_files(folder, last)
    if not found:
        raise DataError(
            f"nothing to score at {where}: give Parquet or tar files, or a folder of images"
        )
    if last.endswith(".tar"):
        model = next((s for s in like.sources if isinstance(s, WebDataset)), WebDataset())
        settings = {"name": "scored", "path": folder, "train": None, "val": last}
        return model.model_copy(update=settings)
    return _parquet_like(folder, last, parquet_columns(join(folder, min(found))), like)


def undivided_images(path: str) -> str | None:
    """Returns the folder of images at `path` that no class folders divide; None for other data.

    That is its `val` folder if it has one.
    """
    where = absolute(path)
    if kind_of(where) != fs.FileType.Directory:
        return None
    if any(matching_files(where, each) for each in PATTERNS):
        return None
    images = _images_of(where)
    return images if not folders_in(images) and _has_images(images) else None


def _images_of(where: str) -> str:
    """Returns the `val` folder of a folder, the folder itself if it has none."""
    val = join(where, "val")
    return val if kind_of(val) == fs.FileType.Directory else where


def _has_images(folder: str) -> bool:
    return any(is_image(found.path) for found in files_below(folder, recursive=False))


def _folder(where: str, labels: str | None) -> ImageFolder:
    """Returns a source for a folder of images: by class, or with a label file."""
    images = _images_of(where)
    if labels is None and not folders_in(images) and _has_images(images):
        raise DataError(
            f"{images} has images and no class folders: give a label file with lines of the form "
            "'file class' (--labels), or let the teacher name them (--teacher)"
        )
    return ImageFolder(
        name="scored",
        path=where,
        train=None,
        val="." if images == where else "val",
        val_labels=None if labels is None else absolute(labels),
    )


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
