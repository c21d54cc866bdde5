"""The one writer of a run's metrics: each step once, spooled while MLflow is away; no Ray.

Metrics MLflow could not take wait in a file, one JSON object a line, and are replayed in order.
"""

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
# A record the server calls wrong will not get better by waiting; one it never saw will.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
MAX_BATCH = 100  # MLflow takes 1000 metrics and 100 parameters a call
# MLflow's own defaults block about four minutes a call when a server is away, and draw bars.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class MetricWriter:
    """Writes one run's metrics, each step once; plain data, so it travels to the Train controller.

    Never raises. After a failure it leaves MLflow alone for `retry_after_s` seconds, so that an
    absent server costs a training run one time-out a minute, not one an epoch. Without a run, or
    while MLflow is away, metrics go to `spool`; `spool` None: tracking is off, nothing is kept.
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
        """Log the finite numbers of `metrics` at step `metrics["epoch"]`.

        Text, which is no metric, becomes a tag `mantis.<name>.<epoch>`.
        """
        if self.spool is None:
            return
        try:
            self._deliver([*self._spooled(), _record(metrics)])
        except Exception:
            logger.exception("metrics of run %s were not recorded", self.run_id)

    def replay(self) -> None:
        """Send what is spooled, if anything."""
        if self.spool is None:
            return
        try:
            if records := self._spooled():
                self._deliver(records)
        except Exception:
            logger.exception("the metrics in %s were not replayed", self.spool)

    def _deliver(self, records: list[dict[str, Any]]) -> None:
        """Spool first, then send: a process killed in between loses nothing."""
        self._spool(records)
        if self.run_id is None or time.monotonic() < self._retry_at:
            return
        waiting = self._send(records)
        if not waiting:
            self.spool.unlink()
        elif len(waiting) < len(records):
            self._spool(waiting)

    def _send(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Send in order; returns what is left from the first record MLflow could not take."""
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
                logger.warning("MLflow is away (%s); metrics go to %s", text, self.spool)
                self._retry_at = time.monotonic() + self.retry_after_s
                return records[index:]
        return []

    def _spool(self, records: list[dict[str, Any]]) -> None:
        self.spool.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.spool, "".join(json.dumps(record) + "\n" for record in records).encode())

    def _spooled(self) -> list[dict[str, Any]]:
        if not self.spool.exists():
            return []
        return [json.loads(line) for line in self.spool.read_text("utf-8").splitlines()]


def bounded_client(uri: str) -> MlflowClient:
    """A client that gives an absent HTTP server seconds, unless the environment says otherwise."""
    for name, value in MLFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers only; NaN and inf are dropped, as MLflow stores inf as 1.8e308."""
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
    """The step is marked with the last batch, so a half-sent record is sent again whole."""
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
    """A key MLflow accepts: it refuses a whole batch for one bad character."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def now_ms() -> int:
    return int(time.time() * 1000)


def without_password(text: str, uri: str) -> str:
    """`text` with the password of `uri` hidden; error messages repeat the whole address."""
    password = urlsplit(uri).password
    return text.replace(f":{password}@", ":***@") if password else text


def failure_text(error: Exception, uri: str) -> str:
    """The first line of an error, fit to be shown."""
    lines = str(error).splitlines() or [type(error).__name__]
    return without_password(lines[0], uri)[:200]


def _record(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A spool line. Its own time stamp makes sending it twice the same as sending it once."""
    values = {name: value for name, value in metrics.items() if name != "epoch"}
    step = int(metrics["epoch"])
    tags = {
        mlflow_key(f"mantis.{name}.{step}"): value
        for name, value in values.items()
        if isinstance(value, str)
    }
    record = {"step": step, "timestamp": now_ms(), "metrics": finite(values)}
    return {**record, "tags": tags}
