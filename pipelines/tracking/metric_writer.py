"""Writes a run's metrics to MLflow, each step once, and spools them while MLflow is away. No Ray.

The spool is a file with one JSON object per line. It is replayed in order.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipelines.storage import write_file

logger = logging.getLogger(__name__)
TRACKING_FAILURES = (MlflowException, SQLAlchemyError, requests.RequestException, OSError)

# The server would refuse such a record again, so it is dropped. Other failures are retried.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
MAX_BATCH = 100  # MLflow accepts 1000 metrics and 100 parameters per call

# MLflow's defaults draw progress bars and block a call for four minutes if the server is away.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class MetricWriter:
    """Writes the metrics of one run, each step once. Never raises.

    It holds plain data only, so it can be sent to the Train controller. After a failure it waits
    `retry_after_s` seconds before it calls MLflow again, so an absent server costs one time-out per
    minute instead of one per epoch. Metrics go to `spool` while MLflow is away or there is no run.
    If `spool` is None, tracking is off and metrics are dropped.
    """

    def __init__(
        self, uri: str, run_id: str | None, spool: Path | None, *, retry_after_s: float = 60.0
    ):
        self.uri = uri
        self.run_id = run_id
        self.spool = spool
        self.retry_after_s = retry_after_s
        self._retry_at = 0.0
        self._last_step: int | None = None

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Logs the finite numbers of `metrics` at step `metrics["epoch"]`.

        A text value becomes the tag `mantis.<name>.<epoch>`, as MLflow's metrics are numbers.
        """
        if self.spool is None:
            return
        try:
            self._deliver([*self._spooled(self.spool), _record(metrics)])
        except Exception:
            logger.exception("metrics of run %s were not recorded", self.run_id)

    def replay(self) -> None:
        """Sends the spooled metrics, if there are any."""
        if self.spool is None:
            return
        try:
            if records := self._spooled(self.spool):
                self._deliver(records)
        except Exception:
            logger.exception("the metrics in %s were not replayed", self.spool)

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        """Spools the records, then sends them. A process killed in between loses none."""
        assert self.spool is not None  # `write` and `replay` return early without one
        self._spool(self.spool, records)
        if self.run_id is None or time.monotonic() < self._retry_at:
            return
        waiting = self._send(records)
        if not waiting:
            self.spool.unlink()
        elif len(waiting) < len(records):
            self._spool(self.spool, waiting)

    def _send(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Sends records in order until MLflow fails. Returns the records that were not sent."""
        assert self.run_id is not None
        for index, record in enumerate(records):
            try:
                client = bounded_client(self.uri)
                if self._last_step is None:
                    tags = client.get_run(self.run_id).data.tags
                    self._last_step = int(tags.get("mantis.last_step", -1))
                if record["step"] > self._last_step:
                    log_record(client, self.run_id, record)
                    self._last_step = record["step"]
            except TRACKING_FAILURES as error:
                text = failure_text(error, self.uri)
                if isinstance(error, MlflowException) and error.error_code in REFUSALS:
                    logger.error("MLflow refused step %s: %s", record["step"], text)
                    continue
                logger.warning(
                    "MLflow does not answer (%s); metrics are kept in %s", text, self.spool
                )
                self._retry_at = time.monotonic() + self.retry_after_s
                return records[index:]
        return []

    @staticmethod
    def _spool(spool: Path, records: list[dict[str, Any]]) -> None:
        spool.parent.mkdir(parents=True, exist_ok=True)
        write_file(spool, "".join(json.dumps(record) + "\n" for record in records).encode())

    @staticmethod
    def _spooled(spool: Path) -> list[dict[str, Any]]:
        if not spool.exists():
            return []
        return [json.loads(line) for line in spool.read_text("utf-8").splitlines()]


def bounded_client(uri: str) -> MlflowClient:
    """Returns a client that waits seconds, not minutes, for an HTTP server that is away.

    Variables that the user has set are kept.
    """
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns the finite numbers of `metrics`. MLflow would store inf as 1.8e308."""
    return {
        mlflow_key(name): float(value)
        for name, value in metrics.items()
        if isinstance(value, numbers.Real)
        and not isinstance(value, bool)
        and math.isfinite(float(value))
    }


def log_record(
    client: MlflowClient, run_id: str, record: Mapping[str, Any], *, mark_step: bool = True
) -> None:
    """Logs a record in batches of MAX_BATCH metrics.

    The last batch marks the step as sent, so a partly sent record is sent again as a whole.
    """
    step = record["step"]
    batch = [Metric(k, v, record["timestamp"], step) for k, v in record["metrics"].items()]
    starts = range(0, max(len(batch), 1), MAX_BATCH)
    for start in starts:
        last = mark_step and start == starts[-1]
        tags = [RunTag("mantis.last_step", str(step))] if last else []
        if start == 0:
            tags += [RunTag(name, text) for name, text in record.get("tags", {}).items()]
        client.log_batch(run_id, metrics=batch[start : start + MAX_BATCH], tags=tags)


def mlflow_key(name: str) -> str:
    """Replaces characters that MLflow does not accept in a key. One would fail a whole batch."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def now_ms() -> int:
    """Returns the time in milliseconds since 1970, the unit of MLflow."""
    return int(time.time() * 1000)


def without_password(text: str, uri: str) -> str:
    """Hides the password of `uri` in `text`, because error messages repeat the whole URI."""
    password = urlsplit(uri).password
    return text.replace(f":{password}@", ":***@") if password else text


def failure_text(error: Exception, uri: str) -> str:
    """Returns the first line of an error, without the password of `uri`, at most 200 characters."""
    lines = str(error).splitlines() or [type(error).__name__]
    return without_password(lines[0], uri)[:200]


def _record(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Builds a spool record. Its time stamp is fixed here, so sending it twice adds nothing."""
    values = {name: value for name, value in metrics.items() if name != "epoch"}
    step = int(metrics["epoch"])
    tags = {
        mlflow_key(f"mantis.{name}.{step}"): value
        for name, value in values.items()
        if isinstance(value, str)
    }
    record = {"step": step, "timestamp": now_ms(), "metrics": finite(values)}
    return {**record, "tags": tags}
