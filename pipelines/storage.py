"""Files under the storage root, on a local disk or behind a URI; knows nothing of stages or Ray."""

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
    """A storage root that cannot be used; the message says what is allowed."""

    exit_code = 2


class Store:
    """Reads and writes under one root.

    A path is relative to the root, or an address under it as `join` returns it. Both a local
    folder and any URI that pyarrow or fsspec understands (s3://, gs://, file://, ...) can be the
    root. Relative roots are made absolute against the current folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root, self.filesystem, self._base = _open_root(str(root))
        self.is_local = isinstance(self.filesystem, fs.LocalFileSystem)

    def join(self, *parts: str) -> str:
        """The full address of a path, in the form the root was given in."""
        relative = self._relative("/".join(parts))
        return f"{self.root}/{relative}" if relative else self.root

    def local_path(self, *parts: str) -> Path | None:
        """The path on this machine's disk, or None if the root is remote."""
        return Path(self._inside("/".join(parts))) if self.is_local else None

    def exists(self, path: str) -> bool:
        return self._info(path).type != fs.FileType.NotFound

    def read_bytes(self, path: str) -> bytes:
        """Raises FileNotFoundError naming the full address."""
        if self._info(path).type != fs.FileType.File:
            raise FileNotFoundError(f"no such file: {self.join(path)}")
        with self.filesystem.open_input_stream(self._inside(path)) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes atomically: a reader, or a crash, sees the old file or the new one, whole.

        Raises StorageError where storage is full or cannot be written.
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
        """Writes a file and deletes it. Raises StorageError where that fails."""
        self.write_bytes(PROBE, b"")
        self.delete(PROBE)

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        """Writes atomically; NaN and infinities are refused (ValueError), they are not JSON."""
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
        self.write_bytes(path, text.encode() + b"\n")

    def list(self, path: str = "") -> list[str]:
        """Sorted names of the entries of a folder; empty if there is no such folder."""
        selector = fs.FileSelector(self._inside(path), allow_not_found=True)
        return sorted(entry.base_name for entry in self.filesystem.get_file_info(selector))

    def delete(self, path: str) -> None:
        """Deletes a file or a whole folder; nothing happens if it is not there."""
        kind = self._info(path).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(self._inside(path))
        elif kind == fs.FileType.File:
            self.filesystem.delete_file(self._inside(path))

    def upload_folder(self, local: str | os.PathLike[str], path: str) -> None:
        """Copies a local folder's files to `path`, file by file, each written atomically."""
        source = Path(local)
        for file in sorted(item for item in source.rglob("*") if item.is_file()):
            self.write_bytes(f"{path}/{file.relative_to(source).as_posix()}", file.read_bytes())

    def download_folder(self, path: str, local: str | os.PathLike[str]) -> Path:
        """Copies a folder's files to a local folder and returns it."""
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
    """What fails inside is told as a failure to write to `address`: StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{address} cannot be written ({error.strerror or error}): free space there or make "
            "it writable, then run again"
        ) from error


class local_copy:
    """Context: a folder's files on this machine's disk, downloaded if they are elsewhere."""

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
    """A URI unchanged, a local path made absolute against `folder` (default: the current one)."""
    if "://" in root:
        return root.rstrip("/")
    return os.path.abspath(os.path.join(folder or os.getcwd(), os.path.expanduser(root)))


def is_shared(root: str) -> bool:
    """Whether every node of a cluster is promised to see this root: any URI, file:// included."""
    return "://" in root


def _open_root(root: str) -> tuple[str, fs.FileSystem, str]:
    """Returns the root's own spelling, its file system and the base path inside that."""
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
    """Writes a file of this machine atomically; its folder exists. Raises OSError."""
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
