"""Logs the use of the driver's machine to a run, by MLflow's own monitor.

The monitor is a thread of the driver. It sees the machine of the driver, not other nodes of a
cluster. Training workers have none, because they do not talk to MLflow.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipelines.tracking.runs import Tracker

STOP_S = 15.0  # a call to MLflow may be under way when the block ends


@contextlib.contextmanager
def system_metrics(
    tracker: Tracker, run_id: str | None, *, retry_after_s: float = 60.0
) -> Iterator[None]:
    """Logs `system/...` metrics to a run inside the block, every ten seconds.

    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL sets another interval. A resumed run continues its
    steps. While MLflow is away there are no samples; it is asked again every `retry_after_s`
    seconds. Enter the block after Ray has started, because Ray forks processes.
    """
    monitor = None
    if run_id is not None:
        monitor = tracker.attempt(
            lambda: _LastingMonitor(run_id, tracker.location.uri, retry_after_s)
        )
    if monitor is None:
        yield
        return
    monitor.start()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        monitor.end(STOP_S)


class _LastingMonitor(SystemMetricsMonitor):
    """MLflow's monitor ends for good at the first call that fails. This one goes on."""

    def __init__(self, run_id: str, uri: str, retry_after_s: float) -> None:
        super().__init__(run_id, resume_logging=True, tracking_uri=uri)  # type: ignore[no-untyped-call]
        self._retry_after_s = retry_after_s
        self._ended = threading.Event()

    def monitor(self) -> None:
        while not self._ended.is_set():
            super().monitor()  # type: ignore[no-untyped-call]
            self._ended.wait(self._retry_after_s)

    def end(self, timeout_s: float) -> None:
        """Ends the thread and sends what it holds. A call that hangs is left behind."""
        self._ended.set()
        # `finish` waits for the thread, and so for MLflow, without a limit.
        finishing = threading.Thread(target=self.finish, daemon=True)
        finishing.start()
        finishing.join(timeout_s)
