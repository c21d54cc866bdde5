"""The Ray Train callback of a stage: hands rank 0's metrics to a MetricWriter and nothing else.

Apart from metric_writer.py so that a command with nothing to train never imports Ray. It travels to
the Train controller as plain values: MLflow is imported there with the first report, while the
workers train, not before they start.
"""

import json
from typing import TYPE_CHECKING, Any

from ray.train import UserCallback

if TYPE_CHECKING:
    from pipelines.metric_writer import MetricWriter


class StageCallback(UserCallback):
    """Runs in the Train controller. It must not raise: Ray would end the training for it.

    A report may carry the figures of all epochs so far as JSON text, `history`: one whose report
    was lost with a killed driver is logged with the next, in order. The writer skips logged ones.
    """

    def __init__(self, writer: "MetricWriter"):
        self._address = (writer.uri, writer.run_id, writer.spool)
        self._writer: MetricWriter | None = None
        self._last_epoch = -1.0

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        from pipelines.metric_writer import MetricWriter

        if self._writer is None:
            self._writer = MetricWriter(*self._address)
        newest = metrics[0]
        for epoch in json.loads(newest.get("history", "[]")) or [newest]:
            if epoch["epoch"] > self._last_epoch:
                self._writer.write(epoch)
                self._last_epoch = epoch["epoch"]
