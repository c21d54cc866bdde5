"""The Ray Train callback of a stage: hands rank 0's metrics to a MetricWriter and nothing else.

Apart from metric_writer.py so that a command with nothing to train never imports Ray. It travels to
the Train controller as plain values: MLflow is imported there with the first report, while the
workers train, not before they start.
"""

from typing import TYPE_CHECKING, Any

from ray.train import UserCallback

if TYPE_CHECKING:
    from pipelines.metric_writer import MetricWriter


class StageCallback(UserCallback):
    """Runs in the Train controller. It must not raise: Ray would end the training for it."""

    def __init__(self, writer: "MetricWriter"):
        self._address = (writer.uri, writer.run_id, writer.spool)
        self._writer: MetricWriter | None = None

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        from pipelines.metric_writer import MetricWriter

        if self._writer is None:
            self._writer = MetricWriter(*self._address)
        self._writer.write(metrics[0])
