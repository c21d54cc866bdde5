"""Writes a run's metrics to MLflow, each step once, and spools them while MLflow is away. No Ray.

The spool is a file with one JSON object per line. It is replayed in order.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from pipelines.storage import private_folder, write_file
from pipelines.tracking.store.client import (
    TRACKING_FAILURES,
    bounded_client,
    explain,
    is_refusal,
)

logger = logging.getLogger(__name__)
MAX_BATCH = 100  # MLflow accepts 1000 metrics and 100 parameters per call


class MetricWriter:
    """Writes the metrics of one run, each step once. Never raises.

    It holds plain data only, so it can be sent to the Train controller. After a failure it waits
    `retry_after_s` seconds before it calls MLflow again, so an absent server costs one time-out per
    minute instead of one per epoch. Metrics go to `spool` while MLflow is away or there is no run.
    If `spool` is None, tracking is off and metrics are dropped. The folder of a `private` spool
    is this user's alone.
    """

    def __init__(
        self,
        uri: str,
        run_id: str | None,
        spool: Path | None,
        *,
        private: bool = False,
        retry_after_s: float = 60.0,
    ):
        self.uri = uri
        self.run_id = run_id
        self.spool = spool
        self.private = private
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
        """Spools the records, then sends them. A process killed in between loses none.

        Sends them also if they cannot be spooled.
        """
        assert self.spool is not None  # `write` and `replay` return early without one
        kept = self._spool(self.spool, records)
        if self.run_id is None or time.monotonic() < self._retry_at:
            return
        waiting = self._send(records)
        if not waiting:
            with contextlib.suppress(OSError):
                self.spool.unlink()
        elif kept and len(waiting) < len(records):
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
                text = explain(error, self.uri)
                if is_refusal(error):
                    logger.error("step %s is dropped: %s", record["step"], text)
                    continue
                logger.warning("%s; metrics are kept in %s", text, self.spool)
                self._retry_at = time.monotonic() + self.retry_after_s
                return records[index:]
        return []

    def _spool(self, spool: Path, records: list[dict[str, Any]]) -> bool:
        """Returns whether the records are on disk. A folder of another user is not written to."""
        try:
            if self.private:
                private_folder(spool.parent)
            else:
                spool.parent.mkdir(parents=True, exist_ok=True)
            write_file(spool, "".join(json.dumps(record) + "\n" for record in records).encode())
        except OSError:
            logger.exception("the metrics of run %s cannot be kept in %s", self.run_id, spool)
            return False
        return True

    @staticmethod
    def _spooled(spool: Path) -> list[dict[str, Any]]:
        try:
            lines = spool.read_text("utf-8").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError:
            logger.exception("the metrics in %s cannot be read", spool)
            return []
        return [json.loads(line) for line in lines]


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
