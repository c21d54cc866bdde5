"""Files by path or URI through pyarrow.fs: join, read, write atomically. Knows no images.

A URI is one without options and secrets: those of a bucket come from the environment.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import posixpath
import stat
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from data_prep.errors import DataError

THREADS = 16  # that wait for the disk or the network
AHEAD = 2  # items for each thread that are begun before their results are wanted
CLIENTS = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Schemes whose file system is a client of a server."""
CLIENT_VARIABLES = ("AWS_", "AZURE_", "CLOUDSDK_", "CLOUD_STORAGE_", "GOOGLE_", "HADOOP_")
"""First letters of the environment variables that a client reads when it is opened."""
WHOLE_ON_CLOSE = ("s3", "gcs")
"""Types of file system where a file appears, or replaces another, when it is closed."""
S3_OPTIONS = "?allow_delayed_open=true"  # one request for a small file instead of three

Item = TypeVar("Item")
Result = TypeVar("Result")


class Found(NamedTuple):
    """A file below a folder. If its name is not UTF-8, `named` is false and `path` has escapes."""

    path: str
    size: int
    named: bool = True


def is_uri(path: str) -> bool:
    """Returns whether a path names its file system, as `s3://bucket/images` does."""
    return "://" in path


def join(base: str, path: str) -> str:
    """Returns `path` below `base`; an absolute path or a URI stands for itself.

    `path` is a name as it is listed. Below a URI a `%` in it is written as `%25`.
    """
    if is_uri(path) or posixpath.isabs(path):
        return path
    if path in ("", "."):
        return base
    return f"{base.rstrip('/')}/{path.replace('%', '%25') if is_uri(base) else path}"


def absolute(path: str) -> str:
    """Returns the path as every worker understands it, whatever its working folder is.

    Raises DataError for a URI to which no path can be appended.
    """
    if not is_uri(path):
        return os.path.abspath(os.path.expanduser(path))
    if fault := uri_fault(path):
        raise DataError(fault)
    return path.rstrip("/")


def uri_fault(uri: str) -> str:
    """Returns why no path can be appended to a URI and what to do, "" if one can.

    Shows no secret.
    """
    scheme, _, rest = uri.partition("://")
    user, _, named = rest.partition("/")[0].rpartition("@")
    if scheme.startswith("abfs"):  # abfs://container@account
        user, named = user.partition(":")[1], rest
    place = rest[rest.index("@") + 1 :] if user else rest
    bare = f"{scheme}://{place.partition('?')[0].partition('#')[0]}"
    if not named and not place.strip("/"):
        return f"{bare!r} names no bucket or folder: give s3://bucket/folder"
    if scheme == "file" and ("?" in uri or "#" in uri):
        return f"{bare} is given with `?` or `#`: write them as %3F and %23"
    if user:
        return (
            f"{bare} is given with a user or a key, which would be written into logs: leave it "
            "out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if "?" in uri or "#" in uri:
        return (
            f"{bare} is given with options behind `?` or `#`, where names of files would be "
            "appended: leave them out, and set AWS_ENDPOINT_URL (such as http://localhost:9000) "
            "and AWS_REGION"
        )
    return ""


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a path and the path inside it.

    Raises DataError for a URI of a kind that cannot be read here.
    """
    if not is_uri(path):
        return fs.LocalFileSystem(), absolute(path)
    try:
        return open_uri(path)
    except (pa.ArrowInvalid, ImportError, NotImplementedError) as error:
        raise DataError(
            f"{path} cannot be opened ({str(error).strip()}): give a local path or a URI of "
            "s3, gs, abfs, hdfs or file; hf needs `pip install huggingface_hub`"
        ) from error


def open_uri(uri: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a URI and the path inside it.

    A process has one client for each bucket or server: to open one takes credentials, a look-up
    of the region and a TLS handshake. A changed environment and a fork get a client of their own.
    Raises pyarrow.ArrowInvalid, ImportError, NotImplementedError or OSError if there is none.
    """
    scheme, _, rest = uri.partition("://")
    server, slash, path = rest.partition("/")
    if scheme == "file" and not server:
        return fs.LocalFileSystem(), f"/{unquote(path)}"
    if scheme not in CLIENTS:
        found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
        return found
    read = tuple(
        sorted(each for each in os.environ.items() if each[0].startswith(CLIENT_VARIABLES))
    )
    store, base = _client(scheme, server, read, os.getpid())
    return store, f"{base}{slash}{unquote(path)}".rstrip("/") or "/"


@functools.lru_cache(maxsize=32)
def _client(
    scheme: str, server: str, environment: tuple[tuple[str, str], ...], process: int
) -> tuple[fs.FileSystem, str]:
    """Returns the client of a bucket or server, and what its paths begin with."""
    options = S3_OPTIONS if scheme == "s3" else ""
    store, base = fs.FileSystem.from_uri(f"{scheme}://{server}{options}")
    return store, base.rstrip("/")


def kind_of(path: str) -> fs.FileType:
    """Returns what a path is: a file, a folder or nothing. Raises DataError if it cannot be told.

    That is so if a bucket refuses or does not answer.
    """
    store, inner = filesystem(path)
    try:
        kind: fs.FileType = store.get_file_info(inner).type
    except OSError as error:
        raise unreadable(path, error) from error
    return kind


def unreadable(path: str, error: OSError) -> DataError:
    """Returns the error for a file or folder that is there and cannot be read."""
    reason = error.strerror or str(error)
    return DataError(
        f"{_escaped(path)} cannot be read ({reason}): check its permissions and the network"
    )


def files_below(folder: str, *, recursive: bool = True) -> list[Found]:
    """Returns the files in a folder or URI, with those below its folders if `recursive`, sorted.

    Leaves out names that begin with a dot and all below them: systems and editors keep their own
    files there. Links are followed, and a broken one is a file of 0 bytes. A folder that is missing
    has none. Raises DataError if a folder may not be read or has a name that is not UTF-8.
    """
    store, inner = filesystem(folder)
    try:
        if isinstance(store, fs.LocalFileSystem):
            found = list(_local(inner, "", recursive, frozenset())) if os.path.isdir(inner) else []
        else:
            found = _remote(store, inner, recursive)
    except OSError as error:
        raise unreadable(getattr(error, "filename", None) or folder, error) from error
    return sorted(found)


def matching_files(home: str, pattern: str) -> dict[str, int]:
    """Returns the bytes of the files below `home` that match the pattern, by their path.

    Names that begin with a dot match none. Raises DataError if a folder may not be read.
    """
    fixed = posixpath.dirname(pattern.split("*")[0].split("?")[0].split("[")[0])
    deep = "/" in pattern[len(fixed) :].lstrip("/")
    prefix = f"{fixed}/" if fixed else ""
    return {
        f"{prefix}{found.path}": found.size
        for found in files_below(join(home, fixed), recursive=deep)
        if found.named and fnmatch.fnmatchcase(f"{prefix}{found.path}", pattern)
    }


def folders_in(folder: str) -> list[str]:
    """Returns the names of the folders in a folder or URI, sorted, without those with a first dot.

    Raises DataError if it may not be read or a name is not UTF-8.
    """
    store, inner = filesystem(folder)
    try:
        if isinstance(store, fs.LocalFileSystem):
            with os.scandir(inner) as entries:
                names = [_folder_name(inner, each.name) for each in entries if _is_folder(each)]
        else:
            names = [
                posixpath.basename(each.path)
                for each in store.get_file_info(fs.FileSelector(inner))
                if each.type == fs.FileType.Directory
            ]
    except OSError as error:
        raise unreadable(getattr(error, "filename", None) or folder, error) from error
    return sorted(name for name in names if not name.startswith("."))


def files_of_each(folder: str, names: list[str]) -> Iterator[list[Found]]:
    """Yields the files below each of the folders of these names in a folder."""
    return in_threads(lambda name: files_below(join(folder, name)), names)


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int | None = None
) -> Iterator[Result]:
    """Yields function(item) of each item, in their order; `threads` (THREADS) work at once.

    Few results are in memory: each thread is at most AHEAD items ahead of who takes them. The error
    of the first item in the order that has one is raised, and no further item is begun.
    """
    count = THREADS if threads is None else threads
    begun: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                begun.append(pool.submit(function, item))
                if len(begun) > AHEAD * count:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for each in begun:
                each.cancel()


def read_bytes(path: str) -> bytes:
    """Reads a whole file. Raises FileNotFoundError where there is none."""
    store, inner = filesystem(path)
    with store.open_input_file(inner) as file:  # a stream makes a request for each 256 kB
        data: bytes = file.read()
    return data


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file: readers see all of it or nothing of it.

    Raises OSError, which names the target.
    """
    store, inner = filesystem(path)
    try:
        put(store, inner, data)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def put(store: fs.FileSystem, path: str, data: bytes) -> None:
    """Writes a whole file of a file system: readers see all of it, or the old one. Raises OSError.

    An object store shows a file once it is complete. Elsewhere it is written beside the target and
    renamed.
    """
    if store.type_name in WHOLE_ON_CLOSE:
        # Not in a `with` block, which would close the stream after an error and so show a part.
        stream = store.open_output_stream(path, compression=None)
        stream.write(data)
        stream.close()
        return
    folder, name = posixpath.split(path)
    partial = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}.partial"
    store.create_dir(folder, recursive=True)
    try:
        with store.open_output_stream(partial, compression=None) as stream:
            stream.write(data)
        if isinstance(store, fs.LocalFileSystem):
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        store.move(partial, path)
    except OSError:
        with contextlib.suppress(OSError):  # there may be none
            store.delete_file(partial)
        raise


def delete_file(path: str) -> None:
    """Removes a file if it is there."""
    store, inner = filesystem(path)
    if store.get_file_info(inner).type == fs.FileType.File:
        store.delete_file(inner)


def delete_folder(path: str) -> None:
    """Removes a folder and all below it if it is there."""
    store, inner = filesystem(path)
    if store.get_file_info(inner).type != fs.FileType.NotFound:
        store.delete_dir(inner)


def _local(
    folder: str, prefix: str, recursive: bool, above: frozenset[tuple[int, int]]
) -> Iterator[Found]:
    """Yields the files of a local folder. Python keeps bytes of names that pyarrow refuses."""
    about = os.stat(folder)
    own = (about.st_dev, about.st_ino)
    if own in above:  # a link to a folder that holds it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if recursive:
                    name = _folder_name(folder, entry.name)
                    yield from _local(entry.path, f"{prefix}{name}/", True, above | {own})
                continue
            try:
                info = entry.stat()
            except OSError:  # a broken link: whoever reads it says so
                yield Found(prefix + _escaped(entry.name), 0, _is_utf8(entry.name))
                continue
            if stat.S_ISREG(info.st_mode):
                yield Found(prefix + _escaped(entry.name), info.st_size, _is_utf8(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads nowhere
        return False


def _remote(store: fs.FileSystem, folder: str, recursive: bool) -> list[Found]:
    selector = fs.FileSelector(folder, recursive=recursive, allow_not_found=True)
    files = (each for each in store.get_file_info(selector) if each.type == fs.FileType.File)
    found = [Found(each.path[len(folder) :].lstrip("/"), each.size) for each in files]
    return [each for each in found if not any(p.startswith(".") for p in each.path.split("/"))]


def _folder_name(folder: str, name: str) -> str:
    if not _is_utf8(name):
        raise DataError(
            f"{folder} has a folder whose name is not UTF-8: {_escaped(name)}. Rename it"
        )
    return name


def _is_utf8(name: str) -> bool:
    return name.isascii() or _escaped(name) == name


def _escaped(name: str) -> str:
    """Returns a local name as text that can be printed and stored."""
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")
