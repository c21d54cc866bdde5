"""Files under the storage root, on a local disk or behind a URI. Knows neither stages nor Ray."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pyarrow import fs

from data_prep.storage import open_uri, put, uri_fault

PROBE = ".writable"
SCRATCH = "scratch"
"""The folder below a local root for temporary files. What a killed process left there may go."""
FULL = (errno.ENOSPC, errno.EDQUOT)
SCHEMES = ("s3", "gs", "gcs", "file", "hdfs", "az", "abfs", "abfss", "http", "https", "memory")


class StorageError(ValueError):
    """Raised if a storage root or a file under it cannot be used."""

    exit_code = 2


class Store:
    """Reads and writes under one root.

    The root is a local folder or a URI that pyarrow can open (s3://, gs://, file://, ...). A
    relative root becomes absolute against the current folder. A path is relative to the root, or a
    full address as `join` returns it.
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
        with self.filesystem.open_input_file(self._inside(path)) as file:
            return bytes(file.read())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Writes atomically: after a crash too, a reader finds the whole old or the whole new file.

        Raises StorageError if storage is full or cannot be written.
        """
        target = self._inside(path)
        with writing(self.join(path)):
            if self.is_local:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                write_file(Path(target), data)
            else:
                put(self.filesystem, target, data)

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


@contextlib.contextmanager
def scratch(root: str, purpose: str) -> Iterator[Path]:
    """Yields a new folder for large temporary files on this machine, and removes it at the end.

    Below a local root it is `scratch/<purpose>-...`, because the disk of TMPDIR is often small. For
    a root behind a URI it lies in TMPDIR. Raises StorageError if its disk is full.
    """
    local = local_root(root)
    above = Path(tempfile.gettempdir()) if local is None else local / SCRATCH
    remedy = "" if local else ", or set TMPDIR to a folder on a larger disk"
    try:
        above.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{purpose}-", dir=above))
    except OSError as error:
        raise StorageError(
            f"{above} cannot be written ({error.strerror or error}): free space there or make it "
            f"writable{remedy}, then run again"
        ) from error
    try:
        yield folder
    except Exception as error:
        if isinstance(error, StorageError) or not is_of_full_disk(error):
            raise
        raise StorageError(
            f"the disk of {above} is full: free some space{remedy}, then run again"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def shared_scratch(root: str, purpose: str) -> Iterator[str]:
    """Yields the address of a new folder below `root` for files that other nodes read as well.

    Removes it at the end.
    """
    store, name = Store(root), f"{SCRATCH}/{purpose}-{secrets.token_hex(4)}"
    try:
        yield store.join(name)
    finally:
        store.delete(name)


def is_of_full_disk(error: BaseException) -> bool:
    """Returns whether an error means that a disk is full. safetensors and Arrow have their own."""
    number = getattr(error, "errno", None)
    return number in FULL or (number is None and os.strerror(errno.ENOSPC) in str(error))


@contextlib.contextmanager
def local_copy(folder: str) -> Iterator[Path]:
    """Yields a folder on the local disk, downloaded into TMPDIR for the block if it is remote."""
    store = Store(folder)
    path = store.local_path()
    if path is not None:
        yield path
        return
    with scratch(folder, "mantis-copy") as made:
        yield store.download_folder("", made)


def absolute_root(root: str, folder: str | os.PathLike[str] | None = None) -> str:
    """Returns a URI unchanged, and a local path absolute against `folder` or the current folder.

    Raises StorageError for a URI that cannot be a root.
    """
    if "://" in root:
        if fault := uri_fault(root):
            raise StorageError(fault)
        return root.rstrip("/")
    if found := re.match(rf"({'|'.join(SCHEMES)}):", root):
        scheme, rest = found[1], root[found.end() :]
        slashes = "///" if scheme == "file" else "//"
        bare, rest = (re.sub(r"[^/@]*:[^/@]*@", "", each.strip("/")) for each in (root, rest))
        raise StorageError(
            f"{bare!r} is no URI: did you mean {scheme}:{slashes}{rest}? A folder of that "
            f"name would be ./{bare}"
        )
    return os.path.abspath(os.path.join(folder or os.getcwd(), os.path.expanduser(root)))


def local_root(root: str) -> Path | None:
    """Returns the folder of a root on this machine's disk, or None if it is remote.

    Opens nothing: to open a bucket takes a network.
    """
    root = absolute_root(root)
    if "://" not in root:
        return Path(root)
    return Path(unquote(urlsplit(root).path)) if root.startswith("file://") else None


def spool_folder(root: str) -> Path:
    """Returns the folder in which figures of runs below `root` wait while MLflow is away.

    That is `spool` below a local root. A remote root has one in the user's cache on this machine.
    """
    local = local_root(root)
    if local is not None:
        return local / "spool"
    return cache_folder() / "spool" / hashlib.sha256(root.encode()).hexdigest()[:12]


def figures_wait(root: str) -> bool:
    """Returns whether figures of runs below `root` wait for MLflow on this machine."""
    return any(spool_folder(root).glob("*.jsonl"))


def cache_folder() -> Path:
    """Returns the folder for files of this user that can be made again. It may not exist yet.

    That is `mantis` below XDG_CACHE_HOME or ~/.cache. A user without a home has it in the
    folder for temporary files.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # there is no HOME
        base = Path(given) if given else Path.home() / ".cache"
        above = next((each for each in (base, *base.parents) if each.is_dir()), Path("/"))
        if os.access(above, os.W_OK):
            return base / "mantis"
    return Path(tempfile.gettempdir()) / f"mantis-{os.getuid()}"


def decoded_folder() -> Path:
    """Returns the folder of decoded images, see `data.cache`."""
    return cache_folder() / "decoded"


def private_folder(folder: Path) -> Path:
    """Makes a folder that only this user can enter, with those of the cache above it.

    Raises PermissionError if one of them belongs to another user.
    """
    if folder.parent.is_relative_to(cache_folder()):
        private_folder(folder.parent)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()}:
        raise PermissionError(f"{folder} belongs to another user")
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def is_shared(root: str) -> bool:
    """Returns whether all nodes of a cluster see the root: true for any URI, file:// included."""
    return "://" in root


def _open_root(root: str) -> tuple[str, fs.FileSystem, str]:
    """Returns the absolute root, its file system and the path inside the file system."""
    root = absolute_root(root)
    if "://" not in root:
        return root, fs.LocalFileSystem(), root
    try:
        filesystem, base = open_uri(root)
    except (ValueError, NotImplementedError, OSError) as error:
        raise StorageError(
            f"{root} cannot be opened: {error}. Give a local folder or a URI such as "
            "s3://bucket/folder, gs://bucket/folder or file:///shared/folder"
        ) from error
    return root, filesystem, base.rstrip("/")


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
