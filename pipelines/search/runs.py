"""Logs a search to MLflow: one run, with a child run for each trial. Only the driver calls this.

The stages of a trial are child runs of the trial, as those of a pipeline are. So `mantis lineage`
and `mantis register` accept the id of a trial's run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.search.journal import TrialRecord
from pipelines.search.space import Params
from pipelines.tracking.runs import Tracker
from pipelines.tracking.store.client import transferring

STATUS = {"finished": "FINISHED", "equal": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""Maps the state of a trial to MLflow's status. The tag `mantis.state` keeps the state itself."""


class SearchRuns:
    """Opens and closes the runs of one search. Ids are None while MLflow does not answer."""

    def __init__(self, tracker: Tracker, key: str, config_name: str) -> None:
        self.tracker, self.key, self.config_name = tracker, key, config_name
        self.run_id: str | None = None

    def open(self, name: str, params: Mapping[str, Any]) -> None:
        """Opens the run of the search, or creates it."""
        tags = {"mantis.name": self.config_name}
        identity = ("mantis.search_key", self.key)
        self.run_id = self.tracker.open_run(name, identity, tags=tags, params=params)

    def open_trial(self, number: int, params: Params, weight: float) -> str | None:
        """Opens the run of a trial, or creates it. Its parameters are the trial's overrides."""
        tags = {
            "mantis.name": self.config_name,
            "mantis.model": self.tracker.model,
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
        """Ends the run of a trial and logs its point, state and reason."""
        run_id = record.run_id or self.open_trial(record.number, record.params, record.weight)
        metrics = dict(record.figures)
        for point in record.points:
            of = "search" if point.level is None else f"search/level-{point.level}"
            metrics |= {f"{of}/wire_bytes": point.wire_bytes, f"{of}/top1": point.top1}
        metrics["search/epochs"] = len(record.epochs)
        tags = {"mantis.state": record.state, "mantis.reason": record.reason}
        self.tracker.finish(run_id, STATUS[record.state], metrics=metrics, tags=tags)

    def repair(self, records: Mapping[int, TrialRecord]) -> None:
        """Closes open runs of ended trials. A driver killed after the journal entry leaves them."""
        for record in records.values():
            if record.state != "running" and self._is_open(record):
                self.close_trial(record)

    def progress(self, step: int, figures: Mapping[str, float]) -> None:
        """Logs figures of the search after its `step`-th ended trial. Each step is logged once."""
        writer = self.tracker.metric_writer(self.run_id, f"search-{self.key}")
        writer.write({"epoch": step, **figures})

    def keep_files(self, folder: Path) -> None:
        """Logs the files of the report as artifacts of the search's run."""
        if self.run_id is not None:
            run_id = self.run_id
            with transferring():
                self.tracker.attempt(lambda: self.tracker.client.log_artifacts(run_id, str(folder)))

    def close(self, status: str, tags: Mapping[str, str] | None = None) -> None:
        """Ends the MLflow run of the search with a status such as FINISHED or KILLED."""
        self.tracker.finish(self.run_id, status, tags=tags)

    def _is_open(self, record: TrialRecord) -> bool:
        run_id = record.run_id
        if run_id is None:
            return True
        run = self.tracker.attempt(lambda: self.tracker.client.get_run(run_id))
        return run is not None and run.info.status == "RUNNING"
