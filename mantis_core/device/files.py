"""Finds the files of a command, names their outputs, and writes each output whole or not at all.

Knows no codec. Needs the standard library alone, because a device has only the client.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
STREAM_SUFFIXES = frozenset((".mts",))
SHOWN_SUFFIXES = 5


class FilesError(ValueError):
    """Raised if inputs cannot be told apart, or an output cannot be written."""

    exit_code = 2


@dataclass(frozen=True)
class Source:
    """A file to read. `place` is its path below the output folder, without the suffix.

    An image that is `inside` a file, under a name in it, has a `path` that says so to people.
    """

    path: Path
    place: str
    inside: tuple[Path, str] | None = None


@dataclass(frozen=True)
class Failure:
    """A file for which a command did nothing, and why."""

    path: Path
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Returns the failure as JSON values."""
        return {"file": shown(self.path), "error": self.reason}


@dataclass
class Found:
    """The files of a command. `others` counts what its folders hold beside them, by suffix."""

    sources: list[Source] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0

    def left_out(self) -> str:
        """Returns one line on the files that the folders hold beside those found; "" for none."""
        parts = []
        if self.others:
            kinds = [f"{name} {count}" for name, count in self.others.most_common(SHOWN_SUFFIXES)]
            more = [] if len(self.others) <= SHOWN_SUFFIXES else ["..."]
            parts.append(f"{self.others.total()} of other kinds ({', '.join(kinds + more)})")
        if self.hidden:
            parts.append(f"{self.hidden} whose names begin with a dot")
        return f"left out: {', '.join(parts)}" if parts else ""


def find(paths: Sequence[Path], suffixes: frozenset[str], *, outputs: Sequence[Path] = ()) -> Found:
    """Returns the given files, and those with a suffix below the given folders, in order of name.

    A given file may have any suffix. Links are followed, a folder is read once. Leaves out the
    folders `outputs`, in which an earlier run may have written.
    """
    found = Found()
    own = {_identity(output) for output in outputs if output.is_dir()}
    for path in paths:
        if path.is_dir():
            _walk(path, suffixes, found, seen=set(own))
        elif path.exists():
            found.sources.append(Source(path, path.stem))
        else:
            found.failures.append(Failure(path, f"cannot read {shown(path)}: no such file"))
    return found


def targets(sources: Sequence[Source], folder: Path, suffix: str) -> dict[Path, Source]:
    """Maps the files to write below `folder` to what they are made of.

    Raises FilesError if two sources would be written to one file.
    """
    named: dict[Path, Source] = {}
    for source in sources:
        target = folder / f"{source.place}{suffix}"
        if target in named:
            raise FilesError(
                f"two files have one name: {shown(named[target].path)} and {shown(source.path)} "
                f"would both be written to {shown(target)}. Give one of them another name, or "
                "give another output folder for each."
            )
        named[target] = source
    return named


def write_whole(target: Path, data: bytes) -> None:
    """Writes a file and its folder. A reader finds the old file or the whole new one.

    Raises FilesError if that fails.
    """
    with writing(target) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `target` at the end of the block.

    An error in the block removes what was written. Raises FilesError for an OSError.
    """
    partial = target.parent / f".mantis-{os.getpid()}.partial"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def cannot_write(target: Path, error: OSError) -> FilesError:
    """Returns the error for a file that cannot be written."""
    return FilesError(
        f"cannot write {shown(target)}: {error.strerror or error}. Free space, or give another "
        "output. What was written before is whole."
    )


def shown(path: Path | str) -> str:
    r"""Returns a file's name as text that any terminal and JSON can hold.

    Bytes that are not UTF-8, and control characters, become escapes such as \xe9 and \n.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def read(path: Path) -> bytes:
    """Reads a file. Raises FilesError with its name."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FilesError(f"cannot read {shown(path)}: {error.strerror or error}") from error


def summary(counts: Mapping[str, int]) -> str:
    """Returns counts as text, such as `3 streams, 1 failed`. Leaves out what is zero."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


def _walk(top: Path, suffixes: frozenset[str], found: Found, seen: set[tuple[int, int]]) -> None:
    def unreadable(error: OSError) -> None:
        name = Path(str(error.filename))
        reason = f"cannot read the folder {shown(name)}: {error.strerror or error}"
        found.failures.append(Failure(name, reason))

    for folder, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        here = Path(folder)
        identity = _identity(here)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        found.hidden += sum(name.startswith(".") for name in names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in suffixes:
                place = os.path.relpath(here / stem, top)
                found.sources.append(Source(here / name, place))
            else:
                found.others[shown(suffix.lower()) or "no suffix"] += 1


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
