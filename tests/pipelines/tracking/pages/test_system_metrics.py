"""The driver's machine is logged to a run, and MLflow's absence neither stops nor delays it."""

import threading
import time
from collections.abc import Callable

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.tracking.pages.system_metrics import system_metrics
from pipelines.tracking.runs import Tracker, TrackingLocation

CPU = "system/cpu_utilization_percentage"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.02")


def open_pipeline(tracker: Tracker) -> str:
    run_id = tracker.open_pipeline("tiny", {}, "plan")
    assert run_id is not None
    return run_id


def steps(tracker: Tracker, run_id: str) -> list[int]:
    return [metric.step for metric in tracker.client.get_metric_history(run_id, CPU)]


def wait_for(done: Callable[[], bool]) -> None:
    for _ in range(500):
        if done():
            return
        time.sleep(0.02)
    raise AssertionError("nothing was logged")


def watchers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "SystemMetricsMonitor"]


def test_a_resumed_run_goes_on_where_it_stopped(tracker: Tracker) -> None:
    run_id = open_pipeline(tracker)
    for wanted in (2, 4):
        with system_metrics(tracker, run_id):
            wait_for(lambda least=wanted: len(steps(tracker, run_id)) >= least)
        assert watchers() == []
    assert steps(tracker, run_id) == list(range(len(steps(tracker, run_id))))


def test_a_call_that_fails_is_followed_by_others(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = open_pipeline(tracker)
    real, failures = MlflowClient.get_run, iter([True, True, True])

    def get_run(client: MlflowClient, run_id: str) -> object:
        if threading.current_thread().name == "SystemMetricsMonitor" and next(failures, False):
            raise MlflowException("away")
        return real(client, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run)
    with system_metrics(tracker, run_id, retry_after_s=0.01):
        wait_for(lambda: bool(steps(tracker, run_id)))
    assert next(failures, "all used") == "all used"


def test_an_absent_server_stops_nothing(
    location: TrackingLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nowhere = TrackingLocation("http://127.0.0.1:9", None, location.spool_folder)
    notes: list[str] = []
    with system_metrics(Tracker(nowhere, "mantis", note=notes.append), "run"):
        done = True
    assert done
    assert watchers() == []


def test_without_a_run_there_is_no_thread(tracker: Tracker) -> None:
    with system_metrics(tracker, None):
        assert watchers() == []
