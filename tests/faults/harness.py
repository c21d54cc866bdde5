"""Runs a command as a user would, kills a process of it, and keeps what it said, with the times.

Knows processes and printed lines; which are killed when, and what is asked of it, is matrix.py's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.root import ROOT

PATIENCE_S = 600.0  # for anything at all to happen; a command silent for longer hangs
LAST_WORDS_S = 10.0  # for what is said of a command after its end
RESUME = re.compile(r"Resume with:\n  (?:.*-m pipelines|\S*mantis) (.+)")


class Command:
    """`mantis ARGUMENTS`, running in `folder`; every printed line with its time."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.arguments = list(arguments)
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pipelines", *arguments],
            cwd=folder,
            env={**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self.ended: float | None = None
        self._news = threading.Condition()
        listener = threading.Thread(target=self._listen, daemon=True)
        listener.start()
        threading.Thread(target=self._await, args=(listener,), daemon=True).start()

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    @property
    def resume(self) -> list[str]:
        """The arguments of the command it said resumes it; empty if it said none."""
        found = RESUME.findall(self.output)
        return shlex.split(found[-1]) if found else []

    def line(self, pattern: str, *, since: int = 0) -> float | None:
        """When a line from number `since` on first matched; None if the command ended before.

        AssertionError if neither comes in PATIENCE_S: it hangs.
        """
        end = time.monotonic() + PATIENCE_S
        with self._news:
            while True:
                for when, line in self.lines[since:]:
                    if re.match(pattern, line):
                        return when
                if self.ended is not None:
                    return None
                assert time.monotonic() < end, f"{pattern} never came:\n{self.output[-3000:]}"
                self._news.wait(1.0)

    def end(self, timeout_s: float) -> float | None:
        """When the command ended; None if it still runs after so many seconds."""
        with self._news:
            self._news.wait_for(lambda: self.ended is not None, timeout_s)
        return self.ended

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the command, if it still runs, and what it started."""
        processes = [*descendants([self.process.pid]), self.process] if self.ended is None else []
        for process in processes:
            process.kill()
        self.process.wait()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                with self._news:
                    self.lines.append((time.monotonic(), line))
                    self._news.notify_all()

    def _await(self, listener: threading.Thread) -> None:
        """A process left behind may hold stdout open: what counts is the end of the command."""
        self.process.wait()
        ended = time.monotonic()
        listener.join(LAST_WORDS_S)
        with self._news:
            self.ended = ended
            self._news.notify_all()


def descendants(pids: Sequence[int]) -> list[psutil.Process]:
    """All processes below these that are still there."""
    found = []
    for pid in pids:
        try:
            found += psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return found


def titled(pids: Sequence[int], title: str) -> Iterator[psutil.Process]:
    """Processes below `pids` whose program or Ray title holds `title`, such as ray::RayTrain."""
    for process in psutil.process_iter():  # Ray's reading tasks last for milliseconds: be quick
        if title in title_of(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                if not {parent.pid for parent in process.parents()}.isdisjoint(pids):
                    yield process


def kill(find: Callable[[], psutil.Process | None], title: str) -> float:
    """Kills the process that `find` gives as soon as there is one; when. It is stopped first and
    its title looked at again, so that what dies is certain to be what was meant."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        process = find()
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
                if title in title_of(process):
                    process.kill()
                    return time.monotonic()
                process.resume()
        time.sleep(0.002)
    raise AssertionError(f"no process {title} came")


def wait_for(find: Callable[[], psutil.Process | None], title: str) -> float:
    """When there was such a process."""
    end = time.monotonic() + PATIENCE_S
    while find() is None:
        assert time.monotonic() < end, f"no process {title} came"
        time.sleep(0.01)
    return time.monotonic()


def title_of(process: psutil.Process) -> str:
    """Its program, or what Ray calls it; empty if it is gone."""
    try:
        return (process.cmdline() or [""])[0]
    except psutil.Error:
        return ""
