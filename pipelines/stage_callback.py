"""The Ray Train callback of a stage: hands rank 0's metrics to a MetricWriter and nothing else.

Apart from metric_writer.py so that a command with nothing to train never imports Ray.
"""

from typing import Any

from ray.train import UserCallback

from pipelines.metric_writer import MetricWriter


class StageCallback(UserCallback):
    """Runs in the Train controller. It must not raise: Ray would end the training for it."""

    def __init__(self, writer: MetricWriter):
        self.writer = writer

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        self.writer.write(metrics[0])
