"""A search in MLflow: one run for it, one a trial, found again after a kill, lineage by a trial."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.search.journal import TrialRecord
from pipelines.search.runs import SearchRuns
from pipelines.tracking import registry
from pipelines.tracking.lookup import find_pipeline
from pipelines.tracking.runs import Tracker, TrackingError, TrackingLocation

EPOCH = {"epoch": 1.0, "holdout/bits": 80.0, "holdout/top1": 0.5}
KEY = "k" * 64


@pytest.fixture
def runs(tracker: Tracker) -> SearchRuns:
    made = SearchRuns(tracker, KEY, "tiny")
    made.open("tiny joint", {"space": "joint"})
    return made


def ended(runs: SearchRuns, number: int, state: Any = "finished") -> TrialRecord:
    params = {"stage2.rate_weight": 0.01, "model.prior": "shared"}
    run_id = runs.open_trial(number, params, 0.25)
    done = {"figures": EPOCH} if state == "finished" else {"reason": "too dear"}
    return TrialRecord(number, params, 0.25, run_id=run_id, state=state, epochs={1: EPOCH}, **done)


def test_a_trial_is_a_run_below_its_search_with_overrides_point_and_state(
    runs: SearchRuns,
) -> None:
    record = ended(runs, 3)
    runs.close_trial(record)
    run = runs.tracker.client.get_run(record.run_id)
    assert run.data.tags["mlflow.parentRunId"] == runs.run_id
    assert run.data.tags["mantis.state"] == "finished"
    assert json.loads(run.data.tags["mantis.overrides"]) == dict(record.params)
    assert run.data.params["stage2.rate_weight"] == "0.01"
    assert run.data.metrics["search/wire_bytes"] == 21.0
    assert run.data.metrics["search/top1"] == 0.5
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("state", "status"), [("stopped", "KILLED"), ("failed", "FAILED"), ("equal", "FINISHED")]
)
def test_every_end_has_its_status_and_reason(runs: SearchRuns, state: Any, status: str) -> None:
    record = ended(runs, 1, state)
    runs.close_trial(record)
    run = runs.tracker.client.get_run(record.run_id)
    assert (run.info.status, run.data.tags["mantis.reason"]) == (status, "too dear")


def test_a_search_and_its_trials_are_found_again_not_made_again(
    runs: SearchRuns, location: TrackingLocation
) -> None:
    first = runs.open_trial(0, {}, 0.5)
    other = SearchRuns(Tracker(location, "mantis"), KEY, "tiny")
    other.open("tiny joint", {"space": "joint"})
    assert other.run_id == runs.run_id
    assert other.open_trial(0, {}, 0.5) == first
    assert other.open_trial(1, {}, 0.5) != first


def test_a_run_a_killed_driver_left_open_is_ended_by_the_next(runs: SearchRuns) -> None:
    left, done = ended(runs, 0), ended(runs, 1, "stopped")
    runs.close_trial(done)
    before = runs.tracker.client.get_run(done.run_id).info.end_time
    runs.repair({0: left, 1: done})
    assert runs.tracker.client.get_run(left.run_id).info.status == "FINISHED"
    assert runs.tracker.client.get_run(done.run_id).info.end_time == before


def test_a_trial_begun_while_mlflow_was_away_gets_its_run_at_the_end(runs: SearchRuns) -> None:
    record = replace(ended(runs, 0), run_id=None)
    runs.close_trial(record)
    found = runs.open_trial(0, record.params, record.weight)
    assert runs.tracker.client.get_run(found).data.metrics["search/top1"] == 0.5


def test_progress_is_logged_once_a_step(runs: SearchRuns) -> None:
    for step, volume in ((1, 0.5), (2, 0.6), (2, 0.6)):
        runs.progress(step, {"search/hypervolume": volume})
    history = runs.tracker.client.get_metric_history(runs.run_id, "search/hypervolume")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.6)]


def test_files_are_artifacts_of_the_search(runs: SearchRuns, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "front.csv").write_text("trial\n")
    runs.keep_files(folder)
    assert [a.path for a in runs.tracker.client.list_artifacts(runs.run_id)] == ["front.csv"]


def test_lineage_takes_a_trial_and_tells_that_a_search_has_trials(
    runs: SearchRuns, tmp_path: Path
) -> None:
    record = ended(runs, 0)
    folder = str(tmp_path / "runs/stages/stage2-abc")
    runs.tracker.open_stage(record.run_id, "stage2", "abc", {}, folder=folder)
    runs.close_trial(record)
    assert record.run_id is not None
    assert [s["name"] for s in registry.lineage(runs.tracker, record.run_id)["stages"]] == [
        "stage2"
    ]
    with pytest.raises(registry.RegistryError, match="no finished evaluate"):
        registry.register(runs.tracker, record.run_id)
    assert runs.run_id is not None
    with pytest.raises(TrackingError, match="is a search"):
        registry.register(runs.tracker, runs.run_id)


def test_latest_is_a_pipeline_never_a_trial(runs: SearchRuns) -> None:
    pipeline = runs.tracker.open_pipeline("tiny", {}, "plan")
    runs.open_trial(0, {}, 0.5)
    assert find_pipeline(runs.tracker, "latest").info.run_id == pipeline


def test_without_mlflow_a_search_has_no_runs_and_no_complaint(location: TrackingLocation) -> None:
    runs = SearchRuns(Tracker(location, "mantis", enabled=False), KEY, "tiny")
    runs.open("tiny joint", {})
    assert runs.open_trial(0, {}, 0.5) is None
    runs.close_trial(TrialRecord(0, {}, 0.5, state="failed"))
    runs.progress(1, {"search/hypervolume": 0.1})
    runs.close("FINISHED")
