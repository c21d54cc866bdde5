"""The Ray Train callback of a stage: hands rank 0's metrics to a MetricWriter and to who listens.

Apart from metric_writer.py so that a command with nothing to train never imports Ray. It travels to
the Train controller as plain values: MLflow is imported there with the first report, while the
workers train, not before they start.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback

if TYPE_CHECKING:
    from pipelines.metric_writer import MetricWriter

Listener = Callable[[Mapping[str, Any]], None]
"""Takes an epoch's figures; whatever it raises ends the training, with its checkpoint in place."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Trainings that begin inside the block tell `listener` of each epoch. It must be picklable."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class StageCallback(UserCallback):
    """Runs in the Train controller. It must not raise: Ray would end the training for it.

    A report may carry the figures of all epochs so far as JSON text, `history`: one whose report
    was lost with a killed driver is logged with the next, in order. The writer skips logged ones.
    """

    def __init__(self, writer: "MetricWriter"):
        self._address = (writer.uri, writer.run_id, writer.spool)
        self._writer: MetricWriter | None = None
        self._last_epoch = -1.0
        self._listener = _listener.get()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        from pipelines.metric_writer import MetricWriter

        if self._writer is None:
            self._writer = MetricWriter(*self._address)
        newest = metrics[0]
        news = [
            epoch
            for epoch in json.loads(newest.get("history", "[]")) or [newest]
            if epoch["epoch"] > self._last_epoch
        ]
        for epoch in news:
            self._writer.write(epoch)
            self._last_epoch = epoch["epoch"]
        for epoch in news if self._listener is not None else ():
            self._listener(epoch)  # raises on purpose, where a search ends a trial early
