"""Files under the storage root, on a local disk or behind a URI. Knows neither stages nor Ray."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

PROBE = ".writable"


class StorageError(ValueError):
    """Raised if a storage root or a file under it cannot be used."""

    exit_code = 2


class Store:
    """Reads and writes under one root.

    The root is a local folder or a URI that pyarrow or fsspec can open (s3://, gs://, file://,
    ...). A relative root becomes absolute against the current folder. A path is relative to the
    root, or a full address as `join` returns it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root, self.filesystem, self._base = _open_root(str(root))
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def join(self, *parts: str) -> str:
        """Returns the full address of a path: a local path or a URI, as the root is."""
        relative = self._relative("/".join(parts))
        return f"{self.root}/{relative}" if relative else self.root

    def local_path(self, *parts: str) -> Path | None:
        """Returns the path on this machine's disk, or None if the root is remote."""
        return Path(self._inside("/".join(parts))) if self.is_local else None

    def exists(self, path: str) -> bool:
        """Returns whether there is a file or folder."""
        return bool(self._info(path).type != fs.FileType.NotFound)

    def is_folder(self, path: str) -> bool:
        """Returns whether there is a folder."""
        return bool(self._info(path).type == fs.FileType.Directory)

    def modified(self, path: str) -> float:
        """Returns the time of the last write in seconds since 1970; 0 if it is unknown."""
        return (self._info(path).mtime_ns or 0) / 1e9

    def usage(self, path: str) -> tuple[int, float]:
        """Returns the bytes of a file or folder and the time of the last write in it."""
        info = self._info(path)
        infos = [info]
        if info.type == fs.FileType.Directory:
            selector = fs.FileSelector(self._inside(path), recursive=True, allow_not_found=True)
            infos += self.filesystem.get_file_info(selector)
        newest = max((each.mtime_ns or 0 for each in infos), default=0)
        return sum(each.size or 0 for each in infos if each.is_file), newest / 1e9

    def read_bytes(self, path: str) -> bytes:
        """Reads a file. Raises FileNotFoundError with the full address."""
        if self._info(path).type != fs.FileType.File:
            raise FileNotFoundError(f"no such file: {self.join(path)}")
        with self.filesystem.open_input_stream(self._inside(path)) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes atomically: after a crash too, a reader finds the whole old or the whole new file.

        Raises StorageError if storage is full or cannot be written.
        """
        target = self._inside(path)
        folder, name = target.rsplit("/", 1)
        with writing(self.join(path)):
            self.filesystem.create_dir(folder, recursive=True)
            if self.is_local:
                write_file(Path(target), data)
                return
            partial = f"{folder}/.{name}.{os.getpid()}.partial"
            with self.filesystem.open_output_stream(partial) as stream:
                stream.write(data)
            self.filesystem.move(partial, target)

    def check_writable(self) -> None:
        """Writes a file and deletes it. Raises StorageError if that fails."""
        self.write_bytes(PROBE, b"")
        self.delete(PROBE)

    def read_json(self, path: str) -> Any:
        """Reads a JSON file. Raises FileNotFoundError with the full address."""
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        """Writes atomically. Raises ValueError for NaN and infinities, which are not JSON."""
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
        self.write_bytes(path, text.encode() + b"\n")

    def files(self, path: str) -> list[str]:
        """Returns the sorted paths of all files below a folder, relative to it."""
        selector = fs.FileSelector(self._inside(path), recursive=True, allow_not_found=True)
        top = len(self._inside(path)) + 1
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.path[top:] for info in infos if info.is_file)

    def list(self, path: str = "") -> list[str]:
        """Returns the sorted names of a folder's entries; none if the folder does not exist."""
        selector = fs.FileSelector(self._inside(path), allow_not_found=True)
        return sorted(entry.base_name for entry in self.filesystem.get_file_info(selector))

    def delete(self, path: str) -> None:
        """Deletes a file or a whole folder. Does nothing if it does not exist."""
        kind = self._info(path).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self._inside(path))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self._inside(path))

    def upload_folder(self, local: str | os.PathLike[str], path: str) -> None:
        """Copies a local folder to `path`, one file at a time. Each is written atomically."""
        source = Path(local)
        for file in sorted(item for item in source.rglob("*") if item.is_file()):
            self.write_bytes(f"{path}/{file.relative_to(source).as_posix()}", file.read_bytes())

    def download_folder(self, path: str, local: str | os.PathLike[str]) -> Path:
        """Copies a folder to a local folder and returns the local one."""
        target = Path(local)
        for name in self.list(path):
            child = f"{path}/{name}"
            if self._info(child).type == fs.FileType.Directory:
                self.download_folder(child, target / name)
            else:
                target.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(self.read_bytes(child))
        return target

    def _info(self, path: str) -> fs.FileInfo:
        return self.filesystem.get_file_info([self._inside(path)])[0]

    def _inside(self, path: str) -> str:
        relative = self._relative(path)
        return f"{self._base}/{relative}" if relative else self._base

    def _relative(self, path: str) -> str:
        if path == self.root or path.startswith(f"{self.root}/"):
            path = path[len(self.root) :]
        parts = [part for part in path.split("/") if part]
        if ".." in parts:
            raise StorageError(f"{path!r} leaves the storage root {self.root}")
        return "/".join(parts)


@contextlib.contextmanager
def writing(address: str) -> Iterator[None]:
    """Turns an OSError inside the block into a StorageError that names `address`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{address} cannot be written ({error.strerror or error}): free space there or make "
            "it writable, then run again"
        ) from error


class local_copy:
    """Context manager that yields a folder on the local disk, downloaded first if it is remote."""

    def __init__(self, folder: str) -> None:
        self.store = Store(folder)
        self.temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Path:
        path = self.store.local_path()
        if path is not None:
            return path
        self.temporary = tempfile.TemporaryDirectory(prefix="mantis-")
        return self.store.download_folder("", self.temporary.name)

    def __exit__(self, *error: object) -> None:
        if self.temporary is not None:
            self.temporary.cleanup()


def absolute_root(root: str, folder: str | os.PathLike[str] | None = None) -> str:
    """Returns a URI unchanged, and a local path absolute against `folder` or the current folder."""
    if "://" in root:
        return root.rstrip("/")
    return os.path.abspath(os.path.join(folder or os.getcwd(), os.path.expanduser(root)))


def is_shared(root: str) -> bool:
    """Returns whether all nodes of a cluster see the root: true for any URI, file:// included."""
    return "://" in root


def _open_root(root: str) -> tuple[str, fs.FileSystem, str]:
    """Returns the absolute root, its file system and the path inside the file system."""
    root = absolute_root(root)
    if "://" not in root:
        return root, fs.LocalFileSystem(), root
    try:
        filesystem, base = fs.FileSystem.from_uri(root)
    except (ValueError, NotImplementedError):
        filesystem, base = _open_fsspec(root)
    return root, filesystem, base.rstrip("/")


def _open_fsspec(root: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, base = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise StorageError(
            f"storage root {root!r} cannot be opened: {error}. "
            "Use a local folder or a URI such as s3://bucket/folder or file:///shared/folder."
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), base


def write_file(target: Path, data: bytes) -> None:
    """Writes a local file atomically into an existing folder. Raises OSError."""
    descriptor, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        shutil.copymode(target, partial) if target.exists() else os.chmod(partial, 0o644)
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
