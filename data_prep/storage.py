"""Files by path or URI through pyarrow.fs: join, read, write atomically. Knows no images."""

from __future__ import annotations

import os
import posixpath
import uuid

from pyarrow import fs

from data_prep.errors import DataError


def is_uri(path: str) -> bool:
    """Returns whether a path names its file system, as `s3://bucket/images` does."""
    return "://" in path


def join(base: str, path: str) -> str:
    """Returns `path` below `base`; an absolute path or a URI stands for itself."""
    if is_uri(path) or posixpath.isabs(path):
        return path
    if path in ("", "."):
        return base
    return f"{base.rstrip('/')}/{path}"


def absolute(path: str) -> str:
    """Returns the path as every worker understands it, whatever its working folder is."""
    return path.rstrip("/") if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def filesystem(path: str) -> tuple[fs.FileSystem, str]:
    """Returns the file system of a path and the path inside it.

    Raises DataError for a URI that this machine cannot open, and OSError if a store is away.
    """
    if is_uri(path):
        try:
            found: tuple[fs.FileSystem, str] = fs.FileSystem.from_uri(path)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise DataError(
                f"{path} cannot be opened: {error}. Give a folder, or a URI such as "
                "s3://bucket/folder, gs://bucket/folder or file:///folder"
            ) from error
        return found
    return fs.LocalFileSystem(), absolute(path)


def read_bytes(path: str) -> bytes:
    """Reads a whole file. Raises FileNotFoundError where there is none."""
    store, inner = filesystem(path)
    with store.open_input_stream(inner) as stream:
        data: bytes = stream.read()
    return data


def write_bytes(path: str, data: bytes) -> None:
    """Writes beside the target, then renames: readers see all of the file or nothing.

    Raises OSError, which names the target.
    """
    store, inner = filesystem(path)
    partial = f"{inner}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        store.create_dir(posixpath.dirname(inner), recursive=True)
        with store.open_output_stream(partial, compression=None) as stream:
            stream.write(data)
        if isinstance(store, fs.LocalFileSystem):
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
        store.move(partial, inner)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


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
