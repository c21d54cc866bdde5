"""A lease on a folder of a remote storage root, which has no locks: one process works there.

A lease is an object with a random token, written again every RENEW_S seconds. One that has not
been written for STALE_S seconds belongs to a process that died, and may be taken over. The clocks
of machines do not matter: an age is a difference between two times of the store. Object stores
promise that a read sees the last write. So of the processes that ask within SETTLE_S seconds, all
but the last to write find another token and give way. A process that was paused for longer than
STALE_S finds another token when it goes on, and gives way too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from pipelines.storage import StorageError, Store

logger = logging.getLogger(__name__)
NAME = "LEASE"
RENEW_S = 15.0
STALE_S = 60.0
SETTLE_S = 2.0
POLL_S = 1.0


class LeaseTaken(RuntimeError):
    """Raised if another process holds a lease. `owner` says which: a machine and a process id."""

    def __init__(self, owner: str) -> None:
        super().__init__(f"another process holds the lease: {owner}")
        self.owner = owner


@contextlib.contextmanager
def leased(store: Store, folder: str) -> Iterator[None]:
    """Holds the lease of a folder inside the block.

    Waits up to STALE_S for the end of a lease that nobody renews. Raises LeaseTaken if another
    process renews it, or takes it over from this one inside the block.
    """
    lease = _Lease(store, f"{folder}/{NAME}")
    lease.acquire()
    stopped = threading.Event()
    keeper = threading.Thread(target=lease.keep, args=(stopped,), name="mantis-lease", daemon=True)
    keeper.start()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ray Train makes the second of the first
        if lease.taken_by is None:
            raise
        raise LeaseTaken(lease.taken_by) from None
    finally:
        stopped.set()
        keeper.join()
        lease.release()


def is_leased(store: Store, folder: str) -> bool:
    """Returns whether a process renewed the lease of a folder less than STALE_S ago.

    Writes nothing, so it goes by the clock of this machine.
    """
    return time.time() - store.modified(f"{folder}/{NAME}") < STALE_S


class _Lease:
    """The lease of this process on one folder."""

    def __init__(self, store: Store, path: str) -> None:
        self._store, self._path = store, path
        self._token = secrets.token_hex(8)
        self.taken_by: str | None = None

    def acquire(self) -> None:
        self._wait_for_the_end_of_another()
        self._write()
        time.sleep(SETTLE_S)
        found = _read(self._store, self._path)
        if found is None or found["token"] != self._token:
            raise LeaseTaken(found["owner"] if found else "unknown")

    def keep(self, stopped: threading.Event) -> None:
        """Renews the lease until `stopped`. Interrupts the main thread once it is lost."""
        while not stopped.wait(RENEW_S):
            try:
                found = _read(self._store, self._path)
                if found is not None and found["token"] != self._token:
                    self.taken_by = found["owner"]
                    signal.raise_signal(signal.SIGINT)
                    return
                self._write()
            except (OSError, StorageError) as error:
                logger.warning("the lease %s cannot be renewed: %s", self._path, error)

    def release(self) -> None:
        """Removes the lease, unless another process has it. A store that is away keeps it."""
        with contextlib.suppress(OSError, StorageError):
            found = _read(self._store, self._path)
            if found is not None and found["token"] == self._token:
                self._store.delete(self._path)

    def _wait_for_the_end_of_another(self) -> None:
        first = _read(self._store, self._path)
        if first is None or _age(self._store, self._path) >= STALE_S:
            return
        end = time.monotonic() + STALE_S
        while time.monotonic() < end:
            time.sleep(POLL_S)
            found = _read(self._store, self._path)
            if found is None:
                return
            if found["written"] != first["written"]:
                raise LeaseTaken(found["owner"])

    def _write(self) -> None:
        self._store.write_json(
            self._path,
            {
                "owner": f"{socket.gethostname()}, process {os.getpid()}",
                "token": self._token,
                "written": secrets.token_hex(4),
            },
        )


def _read(store: Store, path: str) -> dict[str, Any] | None:
    """Returns what a lease holds, None if there is none."""
    try:
        found: dict[str, Any] = store.read_json(path)
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:  # cut short by a store that does not write atomically
        return {"owner": "unknown", "token": "", "written": ""}
    return found


def _age(store: Store, path: str) -> float:
    """Returns the seconds since a lease was written, by the store's own clock."""
    probe = f"{path}-{secrets.token_hex(4)}"
    store.write_bytes(probe, b"now")
    try:
        return store.modified(probe) - store.modified(path)
    finally:
        store.delete(probe)
