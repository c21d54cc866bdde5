"""The `image_folder` source: image files in folders named by class id, locally or below a URI.

Layouts: `train/<class>/**/*.JPEG` (also Tiny ImageNet's `train/<class>/images/`), the same for val
or a flat val folder with a label file, and a bare `<class>/*` folder as one split.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pyarrow as pa
from pyarrow import fs

from data_prep.errors import DataError
from data_prep.sources.base import RawRow, SourceConfig, missing, references
from data_prep.sources.labels import read_labels
from data_prep.storage import filesystem, join

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TINY_IMAGENET_LABELS = "val_annotations.txt"
THREADS = 16  # listing and reading wait for the disk or the network
READ_AHEAD = 64  # files
HASHED_BYTES = 256 * 2**20  # of a split whose content enters its state: a second of reading
HASHED_FILES = 10_000


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
    val_labels: str | None = None
    """Label file, below `path`, of a val folder that is not divided by class: CSV, or lines with
    an image, a tab or a blank, and its class id. A header may name the columns `file` and
    `class`. An image is named by its path below the val folder or below `path`, or by its name
    if no other image has it. Left out, Tiny ImageNet's `val_annotations.txt` is taken if the val
    folder has one."""

    def listing(self, root: str, split: str) -> pa.Table:
        listed = self._listed(root, split)
        paths = [path for path, _, _ in listed]
        zeros = [0] * len(listed)
        return references(paths, [[name] for _, name, _ in listed], paths, zeros, zeros)

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        yield from self._files(root, references["path"].to_pylist())

    def state(self, root: str, split: str) -> Iterator[str]:
        """Yields a line for each image: path, class id, size.

        A split of up to HASHED_FILES images and HASHED_BYTES adds a hash of each image. Reading
        more would delay every plan. Dates do not count, because copies have others.
        """
        listed = self._listed(root, split)
        lines = ("\t".join(map(str, each)) for each in listed)
        if len(listed) > HASHED_FILES or sum(size for _, _, size in listed) > HASHED_BYTES:
            yield from lines
            return
        rows = self._files(root, [path for path, _, _ in listed])
        for line, row in zip(lines, rows, strict=True):
            content = "unreadable" if row.error else hashlib.sha256(row.image).hexdigest()
            yield f"{line}\t{content}"

    def _files(self, root: str, paths: list[str]) -> Iterator[RawRow]:
        """Yields the files at these paths below `path`, in order."""
        store, base = filesystem(join(root, self.path))

        def read_one(path: str) -> RawRow:
            try:
                with store.open_input_stream(f"{base}/{path}", compression=None) as stream:
                    return RawRow(stream.read(), {})
            except FileNotFoundError:
                return RawRow(b"", {}, error="file is gone")
            except OSError as error:
                return RawRow(b"", {}, error=f"cannot be read: {error.strerror or error}")

        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(paths), READ_AHEAD):
                yield from pool.map(read_one, paths[start : start + READ_AHEAD])

    def _listed(self, root: str, split: str) -> list[tuple[str, str, int]]:
        """Returns (path below self.path, class id, bytes) of each image, sorted by path."""
        folder = self.train if split == "train" else self.val
        if folder is None:
            return []
        home = join(root, self.path)
        where = join(home, folder)
        store, inner = filesystem(where)
        if store.get_file_info(inner).type != fs.FileType.Directory:
            raise missing(self, f"{split} folder", where)
        labels = self._label_file(store, home, inner) if split == "val" else None
        if labels is not None:
            found = _labelled(_images(store, inner), *labels, folder)
        else:
            found = _by_folder(store, inner)
        if not found:
            raise missing(self, f"images in folders named by class ({split})", where)
        prefix = "" if folder == "." else f"{folder.strip('/')}/"
        return sorted((f"{prefix}{path}", class_id, size) for path, class_id, size in found)

    def _label_file(
        self, store: fs.FileSystem, home: str, val_folder: str
    ) -> tuple[bytes, str] | None:
        """Returns (content, name) of a flat val folder's label file, None for class folders."""
        if self.val_labels is not None:
            where = filesystem(join(home, self.val_labels))[1]
            if store.get_file_info(where).type != fs.FileType.File:
                raise missing(self, "label file (val_labels)", where)
        else:
            where = posixpath.join(val_folder, TINY_IMAGENET_LABELS)
            if store.get_file_info(where).type != fs.FileType.File:
                return None
        with store.open_input_stream(where, compression=None) as stream:
            return stream.read(), where


def _images(store: fs.FileSystem, folder: str) -> list[tuple[str, int]]:
    """Returns (path below folder, bytes) of every image file below it."""
    found = store.get_file_info(fs.FileSelector(folder, recursive=True))
    return [
        (entry.path[len(folder) :].lstrip("/"), entry.size)
        for entry in found
        if entry.type == fs.FileType.File and entry.path.lower().endswith(IMAGE_SUFFIXES)
    ]


def _by_folder(store: fs.FileSystem, folder: str) -> list[tuple[str, str, int]]:
    """Returns (path, class id, bytes) of each image; its first folder names its class."""
    entries = store.get_file_info(fs.FileSelector(folder))
    classes = [entry.path for entry in entries if entry.type == fs.FileType.Directory]
    with ThreadPoolExecutor(THREADS) as pool:
        listings = list(pool.map(lambda path: _images(store, path), classes))
    found = []
    for path, images in zip(classes, listings, strict=True):
        class_id = posixpath.basename(path)
        found += [(f"{class_id}/{name}", class_id, size) for name, size in images]
    return found


def _labelled(
    images: list[tuple[str, int]], content: bytes, label_file: str, folder: str
) -> list[tuple[str, str, int]]:
    """Returns (path, class id, bytes) of each image with the class that the label file gives it."""
    labels = read_labels(content, label_file, [path for path, _ in images], folder=folder)
    unlabelled = sorted(path for path, _ in images if path not in labels)
    if unlabelled:
        raise DataError(
            f"{label_file} has no line for {len(unlabelled)} of {len(images)} images, the first is "
            f"{unlabelled[0]}; add lines of the form 'file class'"
        )
    return [(path, labels[path], size) for path, size in images]
