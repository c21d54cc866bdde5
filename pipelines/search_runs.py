"""A search in MLflow: one run for it, one below it for each trial. Only the driver writes here.

A trial's run has its stages below it as a pipeline's has, so `mantis lineage` and
`mantis register` take its id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.search_journal import TrialRecord
from pipelines.search_space import Params
from pipelines.tracking import Tracker

STATUS = {"finished": "FINISHED", "equal": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's word for how a trial ended; the tag `mantis.state` has ours."""


class SearchRuns:
    """The runs of one search. While MLflow is away, ids are None and work goes on."""

    def __init__(self, tracker: Tracker, key: str, config_name: str) -> None:
        self.tracker, self.key, self.config_name = tracker, key, config_name
        self.run_id: str | None = None

    def open(self, name: str, params: Mapping[str, Any]) -> None:
        """The run of the search, reopened or created."""
        tags = {"mantis.name": self.config_name}
        identity = ("mantis.search_key", self.key)
        self.run_id = self.tracker.open_run(name, identity, tags=tags, params=params)

    def open_trial(self, number: int, params: Params, weight: float) -> str | None:
        """The run of a trial; its parameters are what it overrides."""
        tags = {
            "mantis.name": self.config_name,
            "mantis.trial": str(number),
            "mantis.state": "running",
            "mantis.overrides": json.dumps(dict(params)),
        }
        if self.run_id is not None:
            tags["mlflow.parentRunId"] = self.run_id
        return self.tracker.open_run(
            f"trial {number}",
            ("mantis.trial_key", f"{self.key[:40]}/{number}"),
            tags=tags,
            params={**params, "cost_weight": round(weight, 6)},
        )

    def close_trial(self, record: TrialRecord) -> None:
        """Ends a trial's run with its point, state and reason."""
        run_id = record.run_id or self.open_trial(record.number, record.params, record.weight)
        point = record.point
        metrics = dict(record.figures)
        if point is not None:
            metrics |= {"search/wire_bytes": point.wire_bytes, "search/top1": point.top1}
        metrics["search/epochs"] = len(record.epochs)
        tags = {"mantis.state": record.state, "mantis.reason": record.reason}
        self.tracker.finish(run_id, STATUS[record.state], metrics=metrics, tags=tags)

    def repair(self, records: Mapping[int, TrialRecord]) -> None:
        """Ends the runs of trials that the journal knows as over: a driver was killed between."""
        for record in records.values():
            if record.state != "running" and self._is_open(record):
                self.close_trial(record)

    def progress(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of the search after its `step`-th ended trial; each step is logged once."""
        writer = self.tracker.metric_writer(self.run_id, f"search-{self.key}")
        writer.write({"epoch": step, **figures})

    def keep_files(self, folder: Path) -> None:
        """The search's files as artifacts of its run."""
        if self.run_id is not None:
            run_id = self.run_id
            self.tracker.attempt(lambda: self.tracker.client.log_artifacts(run_id, str(folder)))

    def close(self, status: str, tags: Mapping[str, str] | None = None) -> None:
        self.tracker.finish(self.run_id, status, tags=tags)

    def _is_open(self, record: TrialRecord) -> bool:
        if record.run_id is None:
            return True
        run = self.tracker.attempt(lambda: self.tracker.client.get_run(record.run_id))
        return run is not None and run.info.status == "RUNNING"
