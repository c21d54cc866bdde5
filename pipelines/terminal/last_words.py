"""Prints how to resume a command that was killed or ended by Ray.

Ray's library exits a driver without an exception when its raylet or the GCS is lost.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Runs in a second process. A byte on stdin means success. The end of stdin without one means that
# the command died.
WATCH = "import sys; sys.stdin.buffer.read(1) or sys.stderr.write(sys.argv[1])"


@contextmanager
def last_words(message: str) -> Iterator[None]:
    """Prints `message` on stderr if the process dies inside the block, in any way."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", WATCH, f"{message}\n"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C reaches the command only
    )
    try:
        yield
    finally:
        watcher.communicate(b".")
