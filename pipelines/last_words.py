"""Says how to resume where the command itself no longer can: it was killed, or Ray ended it.

Ray's library ends a driver that has lost its raylet or the GCS without an exception.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Runs beside the command: a byte on stdin says that all is well, the end of stdin that it is not.
WATCH = "import sys; sys.stdin.buffer.read(1) or sys.stderr.write(sys.argv[1])"


@contextmanager
def last_words(message: str) -> Iterator[None]:
    """A process that ends inside the block, in whatever way, leaves `message` on its stderr."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCH, f"{message}\n"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the command
    )
    try:
        yield
    finally:
        watcher.communicate(b".")
