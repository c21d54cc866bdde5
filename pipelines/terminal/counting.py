"""Shows how many files a command has done: a bar on a terminal, else a line a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

INTERVAL_S = 60.0  # between two lines where there is no terminal


class Counter:
    """Counts what is done and prints results on stdout, above the bar if there is one."""

    def __init__(self, what: str, total: int, bar: Progress | None) -> None:
        self._what, self._total, self._bar = what, total, bar
        self._done, self._told = 0, time.monotonic()
        self._task = None if bar is None else bar.add_task(what, total=total)

    def line(self, text: str) -> None:
        """Prints one line of the command's result on stdout."""
        if self._bar is not None and self._bar.console.file is sys.stdout:
            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            typer.echo(text)

    def warn(self, text: str) -> None:
        """Prints one line on stderr."""
        if self._bar is not None and sys.stderr.isatty():
            self._bar.console.print(Text(text), soft_wrap=True)
        else:
            typer.echo(text, err=True)

    def step(self) -> None:
        """Counts one more as done."""
        self._done += 1
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task)
        elif time.monotonic() - self._told >= INTERVAL_S:
            self._told = time.monotonic()
            typer.echo(f"{self._done:,} of {self._total:,} {self._what}", err=True)


@contextmanager
def counting(what: str, total: int) -> Iterator[Counter]:
    """Yields a counter of `total` files that are called `what`, such as `images`."""
    terminal = next((each for each in (sys.stdout, sys.stderr) if each.isatty()), None)
    if terminal is None or total < 2:
        yield Counter(what, total, None)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=terminal),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        yield Counter(what, total, bar)
