"""Redirects what libraries print and log to a file, so the terminal shows only the console."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

NOISE = ("Failed to query Ray Train Controller actor state",)
"""Messages that Ray Train repeats each second of a training on a Ray without dashboard."""


@contextlib.contextmanager
def captured_output(folder: Path) -> Iterator[tuple[TextIO, TextIO, Path]]:
    """Redirects stdout and stderr inside the block to `<folder>/<date>.log`.

    Covers Python's streams, logging and warnings, and the file descriptors 1 and 2, which Ray's
    processes inherit. Yields the real stdout, the real stderr and the path of the log. No other
    code sets up logging.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}.log"
    stdout, stderr = _own_stream(sys.stdout, 1), _own_stream(sys.stderr, 2)
    saved = [os.dup(1), os.dup(2)]
    with _Log(path.open("ab"), encoding="utf-8", errors="replace", line_buffering=True) as log:
        handler = logging.StreamHandler(log)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield stdout, stderr, path
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)
            root.setLevel(level)
            _release_log(log)
            for descriptor, copy in enumerate(saved, start=1):
                os.dup2(copy, descriptor)
                os.close(copy)
            for stream, original in ((stdout, sys.stdout), (stderr, sys.stderr)):
                stream.flush()
                if stream is not original:
                    stream.close()


class _Log(io.TextIOWrapper):
    """A log without the lines that say nothing of a run. Ray prints each by one call of print."""

    def write(self, text: str, /) -> int:
        dropped: set[int] = self.__dict__.setdefault("_dropped", set())
        thread = threading.get_ident()
        if any(noise in text for noise in NOISE):
            dropped.add(thread)
            return len(text)
        if text == "\n" and thread in dropped:
            dropped.discard(thread)
            return 1
        return super().write(text)


def _own_stream(stream: TextIO, descriptor: int) -> TextIO:
    """Returns the stream, or a copy of it if it writes to the redirected descriptor."""
    stream.flush()
    try:
        if stream.fileno() != descriptor:
            return stream
    except (io.UnsupportedOperation, AttributeError):
        return stream
    copy = os.dup(descriptor)
    return os.fdopen(copy, "w", encoding=stream.encoding, errors=stream.errors, buffering=1)


def _release_log(log: TextIO) -> None:
    """Points handlers that libraries created on the redirected stderr to the real one."""
    known = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    for logger in [logging.getLogger(), *known]:
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is log:
                handler.setStream(sys.stderr)
