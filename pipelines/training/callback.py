"""The Ray Train callback of a stage: passes on metrics, and decides which errors end a training.

It is not in metric_writer.py, so a command that trains nothing does not import Ray. Ray pickles it
to the Train controller. MLflow is imported there at the first report, so that it does not delay
the start of the workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback

from pipelines.training.causes import WorkersLost, ends_training, first_cause

if TYPE_CHECKING:
    from pipelines.tracking.metric_writer import MetricWriter

Listener = Callable[[Mapping[str, Any]], None]
"""Receives the figures of an epoch. Any error it raises ends the training after that report."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Calls `listener` after each epoch of trainings started in the block. It must be picklable."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class StageCallback(UserCallback):
    """Runs in the Train controller. An error here ends the training, without a restart.

    Only a listener raises one, and `after_exception`: for a worker's error that would come again,
    and once workers were lost more than `max_failures` times since the last new epoch.
    A report may have the figures of all epochs so far as JSON text in `history`. An epoch whose
    report was lost with a killed driver is then logged with the next report. The writer skips
    epochs that it has already logged.
    """

    def __init__(self, writer: MetricWriter, max_failures: int):
        self._address = (writer.uri, writer.run_id, writer.spool)
        self._writer: MetricWriter | None = None
        self._last_epoch = -1.0
        self._max_failures = max_failures
        self._failures = 0  # since the last epoch that was finished for the first time
        self._listener = _listener.get()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        from pipelines.tracking.metric_writer import MetricWriter

        if self._writer is None:
            self._writer = MetricWriter(*self._address)
        newest = metrics[0]
        news = [
            epoch
            for epoch in json.loads(newest.get("history", "[]")) or [newest]
            if epoch["epoch"] > self._last_epoch
        ]
        if news:
            self._failures = 0
        for epoch in news:
            self._writer.write(epoch)
            self._last_epoch = epoch["epoch"]
        listener = self._listener
        if listener is None:
            return
        for epoch in news:
            listener(epoch)  # raises on purpose if a search stops a trial early

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raises an error that a restart would meet again, or WorkersLost after too many restarts.

        Any other costs a restart.
        """
        causes = [first_cause(error) for error in worker_exceptions.values()]
        for cause in filter(ends_training, causes):
            raise cause
        self._failures += 1
        if self._failures > self._max_failures:
            raise WorkersLost(self._failures, causes[0]) from causes[0]
