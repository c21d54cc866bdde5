"""A bucket of tests and benchmarks: a folder whose calls wait as those of an object store do.

Holds no measurement. Calls are counted, and so is how many of them wait at once.
"""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from pyarrow import PythonFile, fs

from data_prep import storage


class Bucket(fs.FSSpecHandler):  # type: ignore[misc]
    """The files below a local folder, behind a network.

    Each call takes `latency_s` more: a listing, a look at a file, its opening, and each of its
    reads. `calls` counts them by kind, `most_in_flight` is how many waited at once.
    """

    def __init__(self, folder: str, *, latency_s: float = 0.0) -> None:
        super().__init__(DirFileSystem(folder, LocalFileSystem()))
        self.calls: Counter[str] = Counter()
        self.most_in_flight = 0
        self._latency_s, self._in_flight, self._lock = latency_s, 0, threading.Lock()

    @contextmanager
    def call(self, kind: str) -> Iterator[None]:
        """Counts a call, and lets it wait."""
        with self._lock:
            self.calls[kind] += 1
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            time.sleep(self._latency_s)
            yield
        finally:
            with self._lock:
                self._in_flight -= 1

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        with self.call("look"):
            found: list[fs.FileInfo] = super().get_file_info(paths)
            return found

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        with self.call("list"):
            found: list[fs.FileInfo] = super().get_file_info_selector(selector)
            return found

    def open_input_stream(self, path: str) -> PythonFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> PythonFile:
        with self.call("open"):
            if not self.fs.isfile(path):
                raise FileNotFoundError(path)
            with self.fs.open(path, mode="rb") as file:
                return PythonFile(_Reads(file.read(), self), mode="r")


class _Reads(io.BytesIO):
    """A file of a bucket; reads behind its end need no call."""

    def __init__(self, content: bytes, bucket: Bucket) -> None:
        super().__init__(content)
        self._bucket = bucket

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.getbuffer().nbytes:
            return b""
        with self._bucket.call("read"):
            return super().read(size)


@contextmanager
def as_bucket(bucket: Bucket) -> Iterator[str]:
    """Yields the URI under which this process finds the bucket within the block."""
    store = fs.PyFileSystem(bucket)

    def opened(scheme: str, server: str, *_: object) -> tuple[fs.FileSystem, str]:
        return store, "."

    with mock.patch.object(storage, "_client", opened):
        yield "s3://made-up"
