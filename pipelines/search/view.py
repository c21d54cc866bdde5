"""Shows a search while it runs: a live table on a terminal, plain lines in a pipe."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipelines.search.journal import TrialRecord, finished_points
from pipelines.search.points import RdPoint, pareto_front
from pipelines.search.space import Params
from pipelines.terminal.console import duration

STATES = ("running", "finished", "stopped", "failed", "equal")
MAX_ROWS = 12  # trials of the front in the live table


class SearchView:
    """Shows trials by state, the best trial, the front and the time left."""

    def __init__(self, stream: TextIO, *, live: bool | None = None) -> None:
        terminal = stream.isatty() if live is None else live
        self._rich = RichConsole(file=stream, force_terminal=terminal or None, soft_wrap=True)
        self._lock = threading.RLock()
        self._trials: dict[int, TrialRecord] = {}
        self._total = self._ended_here = 0
        self._concurrent = 1
        self._epochs = 0
        self._started = time.monotonic()
        self._live = (
            Live(console=self._rich, get_renderable=self._table, refresh_per_second=2)
            if terminal
            else None
        )

    def __enter__(self) -> SearchView:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None and self._live.is_started:
            self._live.stop()

    def start(
        self, trials: dict[int, TrialRecord], *, total: int, concurrent: int, epochs: int
    ) -> None:
        """Starts the display. `trials` are those in the journal, `epochs` the most per trial."""
        with self._lock:
            self._trials = dict(trials)
            self._total, self._concurrent, self._epochs = total, concurrent, epochs
            self._started = time.monotonic()
        if self._live is not None:
            self._live.start()
        ended = sum(record.state != "running" for record in trials.values())
        known = f", {ended} already ended" if ended else ""
        self._line(f"search: {total} trials{known}, {concurrent} at a time")

    def began(self, record: TrialRecord) -> None:
        """Prints that a trial has started or resumed, with its sample."""
        self._keep(record)
        self._line(
            f"trial {record.number}: {'resuming' if record.epochs else 'started'}, "
            f"{describe_params(record.params)}"
        )

    def epoch(self, record: TrialRecord) -> None:
        """Prints the newest figures of a running trial."""
        self._keep(record)
        self._line(
            f"trial {record.number}: epoch {len(record.epochs)}/{self._epochs}"
            f"{_figures(record.points)}"
        )

    def ended(self, record: TrialRecord) -> None:
        """Prints how a trial ended and how much of the search is left."""
        self._keep(record)
        with self._lock:
            self._ended_here += record.state != "equal"
        reason = f", {record.reason}" if record.reason else ""
        place = ", on the front" if record.number in self._front() else ""
        left = f", {text} left" if (text := self._time_left()) else ""
        done = sum(r.state != "running" for r in self._trials.values())
        self._line(
            f"trial {record.number}: {record.state}{reason}{_figures(record.points)}{place} "
            f"({done}/{self._total}{left})"
        )

    def _keep(self, record: TrialRecord) -> None:
        with self._lock:
            self._trials[record.number] = record

    def _front(self) -> list[int]:
        front = pareto_front(finished_points(self._trials))
        return list(dict.fromkeys(number for number, _ in front))

    def _time_left(self) -> str:
        """Estimates the time left from the mean time of a trial in this session.

        Empty before the first trial has ended.
        """
        with self._lock:
            open_trials = self._total - sum(r.state != "running" for r in self._trials.values())
            if not self._ended_here or open_trials <= 0:
                return ""
            mean = (time.monotonic() - self._started) / self._ended_here
        return duration(mean * open_trials)

    def _line(self, message: str) -> None:
        if self._live is None:
            self._rich.print(Text(message))

    def _table(self) -> Group:
        with self._lock:
            counts = Counter[str](record.state for record in self._trials.values())
            front = [self._trials[number] for number in self._front()]
            running = [r for r in self._trials.values() if r.state == "running"]
        head = Table.grid(padding=(0, 2))
        waiting = self._total - sum(counts.values())
        head.add_row(
            "trials", *(f"{counts[state]} {state}" for state in STATES), f"{waiting} to come"
        )
        elapsed = duration(time.monotonic() - self._started)
        head.add_row("time", elapsed, f"{self._time_left() or 'unknown'} left")
        if front:
            best = max(front, key=lambda record: max(point.top1 for point in record.points))
            head.add_row("best top1", f"trial {best.number}{_figures(best.points)}")
        body = Table("", "trial", "epoch", "top1", "bytes", "sample", box=None, pad_edge=False)
        for mark, records in (("▸", running), ("◆", front[-MAX_ROWS:])):
            for record in records:
                body.add_row(
                    mark,
                    str(record.number),
                    f"{len(record.epochs)}/{self._epochs}",
                    _span([point.top1 for point in record.points], ".4g"),
                    _span([point.wire_bytes for point in record.points], ".1f"),
                    describe_params(record.params),
                )
        return Group(head, body)


def describe_params(params: Params) -> str:
    """Formats a sample as one line."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in params.items()
    )


def _figures(points: Sequence[RdPoint]) -> str:
    if not points:
        return ""
    top1 = _span([point.top1 for point in points], ".4g")
    return f", top1 {top1} at {_span([point.wire_bytes for point in points], '.1f')} bytes"


def _span(values: Sequence[float], spec: str) -> str:
    """Formats the values of a trial: one, or the least and the most of several rates."""
    texts = (
        dict.fromkeys(f"{value:{spec}}" for value in (min(values), max(values))) if values else ()
    )
    return " to ".join(texts)
