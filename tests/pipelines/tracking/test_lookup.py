"""Which run is the latest, where its stages lie, and that looking creates nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.tracking import lookup
from pipelines.tracking.lookup import stage_folder, upstream_keys
from pipelines.tracking.runs import Tracker, TrackingLocation, upstream_tags
from pipelines.tracking.store.client import TrackingError


def pipeline(location: TrackingLocation, experiment: str, plan: str) -> str:
    run_id = Tracker(location, experiment).open_pipeline("tiny", {}, plan)
    assert run_id is not None
    return run_id


def test_latest_is_the_last_run_of_any_experiment_and_looking_creates_none(
    location: TrackingLocation, tracker: Tracker
) -> None:
    run_id = pipeline(location, "pets", "plan")
    before = [each.name for each in tracker.client.search_experiments()]
    assert lookup.find_pipeline(tracker, "latest").info.run_id == run_id
    assert lookup.find_pipeline(tracker, "latest", "pets").info.run_id == run_id
    assert [each.name for each in tracker.client.search_experiments()] == before
    assert "mantis" not in before


def test_a_resumed_run_is_the_latest(
    location: TrackingLocation, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((1000, 2000, 3000))
    monkeypatch.setattr("pipelines.tracking.runs.now_ms", lambda: next(times))
    first = pipeline(location, "pets", "one")
    second = pipeline(location, "cars", "two")
    assert lookup.find_pipeline(tracker, "latest").info.run_id == second
    assert pipeline(location, "pets", "one") == first
    assert lookup.find_pipeline(tracker, "latest").info.run_id == first
    assert lookup.find_pipeline(tracker, "latest", "cars").info.run_id == second


def test_a_run_of_earlier_code_is_found_too(location: TrackingLocation, tracker: Tracker) -> None:
    run_id = pipeline(location, "pets", "one")
    tracker.client.delete_tag(run_id, "mantis.opened_ms")
    assert lookup.find_pipeline(tracker, "latest").info.run_id == run_id


def test_where_there_is_none_the_experiments_that_have_some_are_named(
    location: TrackingLocation, tracker: Tracker
) -> None:
    pipeline(location, "pets", "one")
    pipeline(location, "cars", "two")
    with pytest.raises(TrackingError, match=r"experiment 'birds' .* have runs: cars, pets"):
        lookup.find_pipeline(tracker, "latest", "birds")


def test_a_deleted_experiment_has_no_latest_run(
    location: TrackingLocation, tracker: Tracker
) -> None:
    run_id = pipeline(location, "pets", "one")
    tracker.client.delete_experiment(tracker.client.get_run(run_id).info.experiment_id)
    with pytest.raises(TrackingError, match="there is no pipeline run"):
        lookup.find_pipeline(tracker, "latest")


def test_the_keys_of_many_ancestors_survive(tracker: Tracker) -> None:
    """MLflow cuts a tag at 8,000 characters."""
    keys = tuple(f"{number:064x}" for number in range(317))
    parent = tracker.open_pipeline("tiny", {}, "plan")
    tracker.open_stage(parent, "evaluate", "k", {}, folder="/runs/k", upstream_keys=keys)
    found = lookup.stages(tracker, lookup.find_pipeline(tracker, "latest"))
    assert found["evaluate"].upstream_keys == keys
    assert upstream_keys(upstream_tags(())) == ()


def test_keys_that_earlier_code_let_be_cut_are_read_as_far_as_they_go() -> None:
    keys = [f"{number:064x}" for number in range(130)]
    cut = json.dumps(keys)[:8000]
    found = upstream_keys({"mantis.upstream_keys": cut})
    assert found == tuple(keys[: len(found)])
    assert len(found) == 117


STAGE = {"mantis.stage": "stage2/none", "mantis.stage_key": "0123456789abcdef"}


@pytest.mark.parametrize(
    "recorded",
    [
        {"mantis.folder": "/gone/stages/stage2/none-0123456789ab"},  # of earlier code
        {"mantis.folder": "stages/stage2/none-0123456789ab", "mantis.root": "/gone"},
    ],
)
def test_a_stage_is_found_by_its_key_below_the_root(
    location: TrackingLocation, recorded: dict[str, str]
) -> None:
    gone = "/gone/stages/stage2/none-0123456789ab"
    tags = {**STAGE, **recorded}
    assert location.root is not None
    assert stage_folder(location, tags) == gone  # this root has no stages
    Path(location.root, "stages").mkdir()
    assert stage_folder(location, tags) == f"{location.root}/stages/stage2/none-0123456789ab"
    assert stage_folder(replace(location, root=None), tags) == gone


def test_a_stages_folder_is_kept_relative_to_the_root(
    location: TrackingLocation, tracker: Tracker
) -> None:
    folder = f"{location.root}/stages/stage1-k"
    run_id = tracker.open_stage(None, "stage1", "k", {}, folder=folder)
    assert run_id is not None
    tags = tracker.client.get_run(run_id).data.tags
    assert (tags["mantis.folder"], tags["mantis.root"]) == ("stages/stage1-k", location.root)


def test_a_stage_opened_while_the_pipeline_had_no_run_gets_its_parent(tracker: Tracker) -> None:
    alone = tracker.open_stage(None, "stage1", "k", {}, folder="/runs/k")
    parent = tracker.open_pipeline("tiny", {}, "plan")
    assert alone is not None
    assert parent is not None
    tracker.open_stage(parent, "stage1", "k", {}, folder="/runs/k")
    assert tracker.client.get_run(alone).data.tags["mlflow.parentRunId"] == parent
    other = tracker.open_pipeline("tiny", {}, "plan-2")
    tracker.open_stage(other, "stage1", "k", {}, folder="/runs/k")
    assert tracker.client.get_run(alone).data.tags["mlflow.parentRunId"] == parent
