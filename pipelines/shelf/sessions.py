"""Finds folders of Ray sessions that ended. Ray leaves one, with its logs, for each start."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "session_"
LATEST = "session_latest"  # a link


@dataclass(frozen=True)
class Session:
    """The folder of an ended session of this user."""

    path: Path
    size: int


def ray_folders() -> list[Path]:
    """Returns the folders in which Ray of this user keeps its sessions."""
    tops = (os.environ.get("RAY_TMPDIR"), tempfile.gettempdir(), "/tmp")
    return list(dict.fromkeys(Path(top) / "ray" for top in tops if top))


def ended_sessions(folders: Sequence[Path], running: str, *, before: float) -> list[Session]:
    """Returns the sessions of this user that have not changed since `before` (Unix seconds).

    `running` is the text of all command lines: Ray's processes name their session.
    """
    found = []
    for path in (each for folder in folders for each in _entries(folder)):
        try:
            status = path.lstat()
        except OSError:
            continue
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if own and path.name not in running:
            size, newest = _usage(path)
            if max(newest, status.st_mtime) <= before:
                found.append(Session(path, size))
    return found


def command_lines() -> str:
    """Returns the command lines of all processes that this user may see."""
    import psutil

    words: list[str] = []
    for process in psutil.process_iter(["cmdline"]):
        words += process.info["cmdline"] or []
    return "\n".join(words)


def remove_session(session: Session) -> str:
    """Removes the folder of a session. Returns why it is still there; "" if it is gone."""
    try:
        shutil.rmtree(session.path)
    except OSError as error:
        return f"cannot remove {session.path}: {error.strerror or error}"
    return ""


def _entries(folder: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    for name in names:
        if name.startswith(PREFIX) and name != LATEST:
            yield folder / name


def _usage(top: Path) -> tuple[int, float]:
    size, newest = 0, 0.0
    for folder, _, names in os.walk(top):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue
            size, newest = size + status.st_size, max(newest, status.st_mtime)
    return size, newest
