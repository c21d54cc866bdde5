"""The `image_folder` source: image files in folders named by class id, locally or below a URI.

Layouts: `train/<class>/**/*.JPEG` (also Tiny ImageNet's `train/<class>/images/`), the same for val
or a flat val folder with a label file, and a bare `<class>/*` folder as one split.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from data_prep.errors import DataError
from data_prep.sources.base import (
    REPEATED,
    RawRow,
    SourceConfig,
    cells,
    class_id_of,
    counted,
    joined,
    missing,
    references,
    repeated,
    with_notes,
)
from data_prep.sources.labels import read_labels
from data_prep.sources.remembering import remembered
from data_prep.storage import (
    Found,
    files_below,
    files_of_each,
    filesystem,
    folders_in,
    in_threads,
    join,
    kind_of,
    read_bytes,
    unreadable,
)

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TINY_IMAGENET_LABELS = "val_annotations.txt"
HASHED_BYTES = 256 * 2**20  # of a split whose content enters its state: a second of reading
HASHED_FILES = 10_000
SHOWN = 6  # suffixes in a sentence
UNNAMED = 1  # position of an image whose name is not UTF-8: it cannot be opened by its path
IMAGES = pa.schema(
    [("path", pa.string()), ("class_id", REPEATED), ("size", pa.int64()), ("named", pa.bool_())]
)
"""Columns of listed images: the path below the source's `path`, the class id, the bytes."""


class Images(NamedTuple):
    """The images of a split (IMAGES), sorted, and sentences on the files that are none."""

    table: pa.Table
    notes: list[str]


class ImageFolder(SourceConfig):
    """Image files in folders named by class id."""

    kind: Literal["image_folder"] = "image_folder"
    """Image files in folders named by class id."""
    path: str = "."
    """Folder or URI that holds the splits; a relative one starts from `data.root`."""
    train: str | None = "train"
    """Folder of the train split below `path`; null where there is none. The default is
    ImageNet's layout."""
    val: str | None = "val"
    """Folder of the val split below `path`; null where there is none."""
    train_labels: str | None = None
    """Label file, below `path`, of a train folder that is not divided by class, as `val_labels`."""
    val_labels: str | None = None
    """Label file, below `path`, of a val folder that is not divided by class: CSV, or lines with
    an image, a tab or a blank, and its class id. A header may name the columns `file` and
    `class`. An image is named by its path below the val folder or below `path`, or by its name
    if no other image has it. Left out, Tiny ImageNet's `val_annotations.txt` is taken if the val
    folder has one."""

    def listing(self, root: str, split: str) -> pa.Table:
        listed, notes = self._listed(root, split)
        paths, ends = listed["path"], pa.array(np.arange(listed.num_rows + 1, dtype=np.int32))
        classes = pa.ListArray.from_arrays(ends, joined(listed["class_id"]))
        rows = positions = pa.array(np.zeros(listed.num_rows, np.int64))
        if not pc.all(listed["named"]).as_py():
            positions = pc.if_else(listed["named"], 0, UNNAMED).cast(pa.int64())
        return with_notes(references(paths, classes, paths, positions, rows), notes)

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        unnamed = [position == UNNAMED for position in references["position"].to_pylist()]
        return self._files(root, references["path"].to_pylist(), unnamed)

    def state(self, root: str, split: str) -> Iterator[str]:
        """Yields a line for each image: path, class id, size.

        A split of up to HASHED_FILES images and HASHED_BYTES adds a hash of each image. Reading
        more would delay every plan. Dates do not count, because copies have others.
        """
        listed, _ = self._listed(root, split)
        columns = (cells(listed[name]) for name in ("path", "class_id", "size"))
        lines = map("{}\t{}\t{}".format, *columns)
        if listed.num_rows > HASHED_FILES or (pc.sum(listed["size"]).as_py() or 0) > HASHED_BYTES:
            yield from lines
            return
        unnamed = pc.invert(listed["named"]).to_pylist()
        rows = self._files(root, listed["path"].to_pylist(), unnamed)
        for line, row in zip(lines, rows, strict=True):
            content = "unreadable" if row.error else hashlib.sha256(row.image).hexdigest()
            yield f"{line}\t{content}"

    def _files(self, root: str, paths: list[str], unnamed: list[bool]) -> Iterator[RawRow]:
        """Yields the files at these paths below `path`, in order."""
        store, base = filesystem(join(root, self.path))

        def read_one(file: tuple[str, bool]) -> RawRow:
            path, without_name = file
            if without_name:
                return RawRow(b"", {}, error="its name is not UTF-8; rename it")
            try:
                with store.open_input_file(f"{base}/{path}") as stream:
                    return RawRow(stream.read(), {})
            except FileNotFoundError:
                return RawRow(b"", {}, error="file is gone")
            except OSError as error:
                return RawRow(b"", {}, error=f"cannot be read: {error.strerror or error}")

        return in_threads(read_one, zip(paths, unnamed, strict=True))

    def _listed(self, root: str, split: str) -> Images:
        """Returns the images of a split. Within one_look() its folders are listed once."""
        key = ("images", self.model_dump_json(), root, split)
        return remembered(key, lambda: self._look(root, split))

    def _look(self, root: str, split: str) -> Images:
        folder = self.train if split == "train" else self.val
        if folder is None:
            return Images(IMAGES.empty_table(), [])
        home = join(root, self.path)
        where = join(home, folder)
        if kind_of(where) != fs.FileType.Directory:
            raise missing(self, f"{split} folder", where, split=split)
        prefix = "" if folder == "." else f"{folder.strip('/')}/"
        labels = self._label_file(home, where, split)
        if labels is None:
            found, notes = _by_folder(where, prefix)
        else:
            images, others = _divided(files_below(where))
            found = [_labelled(images, *labels, folder, prefix)]
            others = [each for each in others if join(where, each.path) != labels[1]]
            notes = [_other_kinds(others)]
        listed = pa.concat_tables([IMAGES.empty_table(), *found])
        if not listed.num_rows:
            error = missing(self, f"images in folders named by class ({split})", where)
            raise DataError(". ".join([str(error), *filter(None, notes)]))
        return Images(listed.combine_chunks(), notes)

    def _label_file(self, home: str, folder: str, split: str) -> tuple[bytes, str] | None:
        """Returns (content, path) of a flat folder's label file, None for class folders."""
        given = self.train_labels if split == "train" else self.val_labels
        if given is not None:
            where = join(home, given)
            if kind_of(where) != fs.FileType.File:
                raise missing(self, f"label file ({split}_labels)", where)
        else:
            where = join(folder, TINY_IMAGENET_LABELS)
            if split == "train" or kind_of(where) != fs.FileType.File:
                return None
        try:
            return read_bytes(where), where
        except OSError as error:
            raise unreadable(where, error) from error


def is_image(path: str) -> bool:
    """Returns whether a file has the suffix of an image that is read."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def _by_folder(where: str, prefix: str) -> tuple[list[pa.Table], list[str]]:
    """Returns the images whose first folder names their class, and sentences on other files."""
    names, listed, others = folders_in(where), {}, []
    for name, below in zip(names, files_of_each(where, names), strict=True):
        images, rest = _divided(below)
        class_id, start = str(class_id_of(name)), f"{prefix}{name}/"
        listed[start] = _table(images, start, repeated(class_id, len(images)))
        others += rest
    loose, _ = _divided(files_below(where, recursive=False))
    in_order = [listed[start] for start in sorted(listed)]
    return in_order, [_other_kinds(others), _in_no_folder(loose)]


def _table(images: Sequence[Found], prefix: str, class_ids: Sequence[str] | pa.Array) -> pa.Table:
    """Returns images (IMAGES) of these class ids, whose paths begin with `prefix`, as they come."""
    columns = [
        [prefix + each.path for each in images],
        class_ids,
        [each.size for each in images],
        [each.named for each in images],
    ]
    return pa.table(columns, schema=IMAGES)


def _divided(files: Iterable[Found]) -> tuple[list[Found], list[Found]]:
    """Returns the image files and the others."""
    images: list[Found] = []
    others: list[Found] = []
    for each in files:
        (images if is_image(each.path) else others).append(each)
    return images, others


def _other_kinds(files: Sequence[Found]) -> str:
    """Returns a sentence on the files that are left out, "" if there are none."""
    if not files:
        return ""
    kinds = Counter(posixpath.splitext(each.path)[1].lower() or "none" for each in files)
    shown = ", ".join(f"{suffix} {count}" for suffix, count in kinds.most_common(SHOWN))
    more = f" and {len(kinds) - SHOWN} more suffixes" if len(kinds) > SHOWN else ""
    return f"left out {counted(len(files), 'file')} of other kinds: {shown}{more}"


def _in_no_folder(images: Sequence[Found]) -> str:
    """Returns a sentence on the images beside the class folders, "" if there are none."""
    if not images:
        return ""
    return f"left out {counted(len(images), 'image')} in no class folder, such as {images[0].path}"


def _labelled(
    images: list[Found], content: bytes, label_file: str, folder: str, prefix: str
) -> pa.Table:
    """Returns the images with the class that the label file gives each."""
    labels = read_labels(content, label_file, [each.path for each in images], folder=folder)
    unlabelled = sorted(each.path for each in images if each.path not in labels)
    if unlabelled:
        raise DataError(
            f"{label_file} has no line for {len(unlabelled)} of {len(images)} images, the first is "
            f"{unlabelled[0]}; add lines of the form 'file class'"
        )
    return _table(images, prefix, [str(class_id_of(labels[each.path])) for each in images])
