"""The `webdataset` source: images and labels in tar files, locally or below a URI.

A sample is the members whose names are equal up to the first dot of the file name: `0001.jpg` and
`0001.cls`. Listing reads the headers of the members and the labels, no image. A reference has the
place of an image in its tar file: `position` is its offset, `row` its size, in bytes.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from data_prep.errors import DataError
from data_prep.sources.base import (
    RawRow,
    SourceConfig,
    counted,
    files_of_split,
    references,
    with_notes,
)
from data_prep.sources.class_ids import ClassIds, Labels
from data_prep.sources.folder import is_image
from data_prep.sources.remembering import remembered
from data_prep.storage import filesystem, in_threads, is_uri, join, unreadable


@dataclass(slots=True)
class Sample:
    """One sample of a tar file: where its image lies, and its label as it is written."""

    key: str
    offset: int = 0
    size: int = -1
    label: Any = None


class WebDataset(SourceConfig):
    """Images and labels in the tar files of a WebDataset."""

    kind: Literal["webdataset"] = "webdataset"
    """Images and labels in the tar files of a WebDataset."""
    path: str = "."
    """Folder or URI that the patterns start from; a relative one starts from `data.root`."""
    train: str | tuple[str, ...] | None = None
    """Pattern, or list of patterns, of the train split's tar files below `path`, such as
    `shards/train-*.tar`. Left out, the source has no such split."""
    val: str | tuple[str, ...] | None = None
    """Pattern, or list of patterns, of the val split's tar files below `path`. Left out, the source
    has no such split."""
    label: str = Field(default="cls", pattern=r"^[^.]+(\.[^.]+)*$")
    """The part of a sample that is its label: the suffix of a member, such as `cls` or `txt`, or a
    field of its JSON, such as `json.label`, which may hold a list. The default is WebDataset's
    usual suffix."""
    class_ids: ClassIds = None
    """Class id of each label. `imagenet` maps 0 to 999 to WordNet ids. Left out, a label is its own
    class id. Images of other labels are counted as images of no task."""

    def listing(self, root: str, split: str) -> pa.Table:
        labels, without_image = Labels(self.class_ids), 0
        rows: list[tuple[str, list[str], str, int, int]] = []
        for (path, _), samples in zip(
            self._tars(root, split), self._all_samples(root, split), strict=True
        ):
            where = join(join(root, self.path), path)
            for sample in samples:
                if sample.size < 0:
                    without_image += 1
                    continue
                ids = labels.class_ids(sample.label, f"{where}, {sample.key}")
                rows.append((f"{path}:{sample.key}", ids, path, sample.offset, sample.size))
        absent = f"left out {counted(without_image, 'sample')} without an image of a known suffix"
        columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 5
        return with_notes(references(*columns), [labels.note(), absent if without_image else ""])

    def read(self, root: str, references: pa.Table) -> Iterator[RawRow]:
        columns = (references[name].to_pylist() for name in ("path", "position", "row"))
        for path, rows in groupby(zip(*columns, strict=True), key=lambda row: row[0]):
            places, done = list(rows), 0
            try:
                store, inner = filesystem(join(join(root, self.path), path))
                with store.open_input_file(inner) as file:
                    for _, offset, size in places:
                        yield RawRow(file.read_at(size, offset), {})
                        done += 1
            except OSError as error:
                reason = f"{path} cannot be read: {error.strerror or error}"
                yield from [RawRow(b"", {}, error=reason)] * (len(places) - done)

    def state(self, root: str, split: str) -> Iterator[str]:
        """Yields a line for each tar file: path, bytes, and a hash of its members and labels.

        A tar file below a URI has no hash, because its headers cannot be read without the images.
        """
        tars = self._tars(root, split)
        remote = is_uri(join(root, self.path))
        found = [[]] * len(tars) if remote else self._all_samples(root, split)
        for (path, size), samples in zip(tars, found, strict=True):
            total = hashlib.sha256()
            for sample in samples:
                total.update(f"{sample}\n".encode())
            yield f"{path}\t{size}\t{total.hexdigest()}"
        yield json.dumps([self.label, self.class_ids])

    def _tars(self, root: str, split: str) -> list[tuple[str, int]]:
        patterns = self.train if split == "train" else self.val
        return files_of_split(self, join(root, self.path), patterns, split)

    def _all_samples(self, root: str, split: str) -> list[list[Sample]]:
        """Returns the samples of each tar file of a split, read once within one_look()."""

        def look() -> list[list[Sample]]:
            places = [join(join(root, self.path), path) for path, _ in self._tars(root, split)]
            return list(in_threads(self._samples, places))

        return remembered(("samples", self.model_dump_json(), root, split), look)

    def _samples(self, where: str) -> list[Sample]:
        """Returns the samples of one tar file in its order. Raises DataError if it is none."""
        store, inner = filesystem(where)
        samples: dict[str, Sample] = {}
        try:
            if is_uri(where):  # read once from front to back: a seek is a request
                stream, mode = store.open_input_stream(inner, compression=None), "r|"
            else:
                stream, mode = store.open_input_file(inner), "r:"
            with stream, tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
                for member in tar:
                    self._note(samples, tar, member, where)
        except tarfile.TarError as error:
            raise DataError(
                f"{where} is no readable tar file ({error}): unpack one that is compressed, and "
                "write one that is damaged again"
            ) from error
        except OSError as error:
            raise unreadable(where, error) from error
        return list(samples.values())

    def _note(
        self,
        samples: dict[str, Sample],
        tar: tarfile.TarFile,
        member: tarfile.TarInfo,
        where: str,
    ) -> None:
        """Adds one member to its sample."""
        folder, name = posixpath.split(member.name)
        stem, _, ending = name.partition(".")
        if not member.isfile() or not stem:
            return
        key = posixpath.join(folder, stem)
        sample = samples.setdefault(key, Sample(key))
        suffix, _, field = self.label.partition(".")
        if ending.lower() == suffix:
            content = tar.extractfile(member)
            assert content is not None  # it is a file
            sample.label = _label(content.read(), field, f"{where}, {member.name}")
        elif is_image(name) and sample.size < 0:
            sample.offset, sample.size = member.offset_data, member.size


def _label(content: bytes, field: str, where: str) -> Any:
    """Returns the label that a member holds: its text, or a field of its JSON."""
    try:
        if not field:
            return content.decode().strip() or None
        value = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is no UTF-8 text or JSON ({error}): correct the label") from error
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
