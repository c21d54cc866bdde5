"""Shows stages while they run: a live table on a terminal, plain lines in a pipe.

Both leave plain lines in the log of the command.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

logger = logging.getLogger(__name__)
LINE_INTERVAL_S = 60.0
"""Seconds after which a pipe and the log get a line about a stage that still runs."""
SHOWN = ("loss", "bpp", "top1")  # last parts of the metric names that have a column

SYMBOLS = {
    "waiting": "·",
    "running": "▸",
    "ran": "✓",
    "resumed": "✓",
    "skipped": "=",
    "stopped": "■",
    "failed": "✗",
}


@dataclass
class _Row:
    state: str = "waiting"
    started: float = 0.0
    told: float = 0.0  # when there last was a line
    seconds: float | None = None
    values: dict[str, Any] = field(default_factory=dict)
    summary: str = ""


class Console:
    """Reports stages, epochs and results. Can be called from several threads.

    `values` maps metric names (`train/loss`, `val/bpp`) to numbers. The time left is estimated from
    `epoch` (from 1), `epochs`, `step` and `steps`, or from `done` and `total`.
    """

    def __init__(self, stream: TextIO, *, live: bool | None = None) -> None:
        terminal = stream.isatty() if live is None else live
        self._rich = RichConsole(file=stream, force_terminal=terminal or None, soft_wrap=True)
        self._rows: dict[str, _Row] = {}
        self._lock = threading.RLock()
        self._live = (
            Live(console=self._rich, get_renderable=self._table, refresh_per_second=4)
            if terminal
            else None
        )

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_live()

    def plan(self, names: Sequence[str]) -> None:
        """Starts the display with the stages to run, in order."""
        with self._lock:
            self._rows = {name: _Row() for name in names}
        if self._live is not None:
            self._live.start()

    def stage_started(self, name: str, *, resumed: bool = False) -> None:
        """Reports the start of a stage."""
        with self._lock:
            now = time.monotonic()
            self._rows[name] = _Row("running", started=now, told=now)
        self._line(f"{name}: {'resuming' if resumed else 'started'}")

    def progress(self, name: str, values: Mapping[str, Any]) -> None:
        """Updates the values of a running stage in the live table. A pipe gets a line a minute."""
        now = time.monotonic()
        with self._lock:
            row = self._rows.setdefault(name, _Row("running", started=now, told=now))
            row.values.update(values)
            due = row.state == "running" and now - row.told >= LINE_INTERVAL_S
            if due:
                row.told = now
        if due:
            self._line(f"{name}: {_under_way(row.values, now - row.started)}")

    def epoch(self, name: str, values: Mapping[str, Any]) -> None:
        """Reports the results of an epoch. Prints one line in a pipe."""
        now = time.monotonic()
        with self._lock:
            row = self._rows.setdefault(name, _Row("running", started=now))
            row.values.update(values)
            row.told = now
        self._line(f"{name}: {_describe(values)}")

    def stage_finished(self, name: str, status: str, seconds: float, summary: str = "") -> None:
        """Reports the end of a stage. `status` is ran, resumed, skipped, stopped or failed."""
        with self._lock:
            row = self._rows.setdefault(name, _Row())
            row.state, row.seconds, row.summary = status, seconds, summary
        took = f" in {duration(seconds)}" if status != "skipped" else ""
        self._line(f"{name}: {status}{took}{f', {summary}' if summary else ''}")

    def note(self, message: str) -> None:
        """Prints one message, above the live table if there is one."""
        logger.info(message)
        self._rich.print(Text(message))

    def final_table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Ends the live display and prints a table of results."""
        self._stop_live()
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        logger.info("\n".join([title, *("  ".join(row) for row in (columns, *rows))]))
        self._rich.print(table)

    def _line(self, message: str) -> None:
        logger.info(message)
        if self._live is None:
            self._rich.print(Text(message))

    def _stop_live(self) -> None:
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row("", "stage", "epoch", "step", *SHOWN, "time", "left")
        with self._lock:
            for name, row in self._rows.items():
                running = row.state == "running"
                elapsed = time.monotonic() - row.started if running else row.seconds
                left = _time_left(row.values, elapsed or 0.0) if running else None
                table.add_row(
                    SYMBOLS[row.state],
                    name,
                    _of(row.values, "epoch", "epochs"),
                    _of(row.values, "step", "steps") or _of(row.values, "done", "total"),
                    *(_number(_find(row.values, short)) for short in SHOWN),
                    "" if elapsed is None else duration(elapsed),
                    "" if left is None else duration(left),
                )
        return table


def duration(seconds: float) -> str:
    """Formats seconds, such as 7.5 s, 12 min 05 s or 1 h 03 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _describe(values: Mapping[str, Any]) -> str:
    """Formats an epoch's metrics as one line, without those of single tasks and loss terms."""
    counted = _of(values, "epoch", "epochs")
    counters = {"epoch", "epochs", "step", "steps", "done", "total"}
    shown = (name for name in values if name not in counters and name.count("/") < 2)
    metrics = [f"{name} {text}" for name in shown if (text := _number(values[name]))]
    return ", ".join([*([f"epoch {counted}"] if counted else []), *metrics])


def _under_way(values: Mapping[str, Any], elapsed: float) -> str:
    """Formats what a running stage has done so far, how long it took, and how long is left."""
    epoch, step = _of(values, "epoch", "epochs"), _of(values, "step", "steps")
    done = _of(values, "done", "total")
    parts = [
        *([f"in epoch {epoch}"] if epoch else []),
        *([f"step {step}"] if step else []),
        *([f"{done} done"] if done and not step else []),
        *(f"{short} {text}" for short in SHOWN if (text := _number(_find(values, short)))),
        f"{duration(elapsed)} so far",
    ]
    left = _time_left(values, elapsed)
    return ", ".join([*parts, *([] if left is None else [f"{duration(left)} left"])])


def _time_left(values: Mapping[str, Any], elapsed: float) -> float | None:
    """Estimates the seconds left from the share of work done. None if that is unknown."""
    if values.get("total"):
        share = values.get("done", 0) / values["total"]
    elif values.get("steps") or values.get("epochs"):
        within = values.get("step", 0) / values["steps"] if values.get("steps") else 0.0
        share = (max(values.get("epoch", 1) - 1, 0) + within) / (values.get("epochs") or 1)
    else:
        return None
    return elapsed * (1 - share) / share if 0 < share <= 1 else None


def _find(values: Mapping[str, Any], short: str) -> Any:
    """Finds the metric with this last part. Prefers val/, then holdout/, then train/."""
    for name in (f"val/{short}", f"holdout/{short}", f"train/{short}", short):
        if name in values:
            return values[name]
    return None


def _of(values: Mapping[str, Any], count: str, total: str) -> str:
    if count not in values:
        return ""
    known = (values[name] for name in (count, total) if name in values)
    return "/".join(str(int(value)) for value in known)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4g}"
