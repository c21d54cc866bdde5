"""Copies the log of a command to its remote storage root.

The log lies on the disk of the driver. On a cluster that disk ends with its node or pod.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.storage import StorageError, Store

logger = logging.getLogger(__name__)
INTERVAL_S = 60.0
FOLDER = "logs"


def log_name() -> str:
    """Returns the name of this command's log: its start, its machine and its process."""
    began = time.strftime("%Y-%m-%dT%H-%M-%S")
    return f"{began}-{socket.gethostname().partition('.')[0]}-{os.getpid()}.log"


@contextlib.contextmanager
def copied(log: Path, store: Store, name: str) -> Iterator[None]:
    """Keeps `logs/<name>` below the root equal to what the block appends to `log`.

    Writes it each minute in which the log has grown, and at the end. A root that cannot be written
    costs a warning in the log, not the run.
    """
    copy = _Copy(log, store, f"{FOLDER}/{name}")
    stopped = threading.Event()

    def keep() -> None:
        while not stopped.wait(INTERVAL_S):
            copy.write()

    thread = threading.Thread(target=keep, name="mantis-log", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        copy.write()


class _Copy:
    """One object of a remote root that holds the end of a growing file."""

    def __init__(self, log: Path, store: Store, path: str) -> None:
        self._log, self._store, self._path = log, store, path
        self._start = log.stat().st_size  # other commands of the day stand above
        self._written = 0

    def write(self) -> None:
        """Writes what the file holds by now, if that is more than before."""
        with self._log.open("rb") as file:
            file.seek(self._start)
            text = file.read()
        if len(text) == self._written:
            return
        try:
            self._store.write_bytes(self._path, text)
        except (StorageError, OSError) as error:
            logger.warning("the log cannot be copied to %s: %s", self._path, error)
        else:
            self._written = len(text)
