"""Ray Tune around the driver: how many trials at a time, and trials that misbehave."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster.preflight import Available, PreflightError
from pipelines.search.driver import SearchDriver
from pipelines.search.journal import Journal
from pipelines.search.points import Halving, SearchObjective
from pipelines.search.result import SearchOptions
from pipelines.search.trial import OUTCOME
from pipelines.search.view import SearchView
from pipelines.settings.sections import ClusterConfig
from pipelines.storage import Store
from tests.pipelines.fakes import same_code
from tests.pipelines.search.test_driver import FakeRuns
from tests.pipelines.search_bench import (
    REFERENCE,
    joint,
    learned,
    outcome,
    small_settings,
    small_task,
)


@pytest.mark.parametrize(
    ("cluster", "nodes", "expected"),
    [
        ({}, [(2, 0)], 1),
        ({}, [(4, 0)], 2),
        ({}, [(16, 0)], 8),
        ({"data_cpus": 0.5, "cpus_per_worker": 0.5}, [(4, 0)], 4),
        ({"workers": 2, "cpus_per_worker": 0.5}, [(2, 0)], 1),
        ({"gpus_per_worker": 1}, [(64, 4)], 4),
        ({"gpus_per_worker": 0.25}, [(64, 1)], 4),
        ({"gpus_per_worker": 0.25}, [(4, 1)], 2),
        ({"gpus_per_worker": 0.4}, [(64, 1), (64, 1)], 4),
        ({"gpus_per_worker": 0.6}, [(64, 1), (64, 1)], 2),
        ({"gpus_per_worker": 2}, [(64, 3), (64, 3)], 2),
        ({"workers": 2, "gpus_per_worker": 1}, [(64, 3)], 1),
        ({"workers": 8, "gpus_per_worker": 1}, [(64, 4)], 1),
        ({"cpus_per_worker": 0.1, "data_cpus": 0.1}, [(1, 0)], 5),
        ({"cpus_per_worker": 3}, [(4, 0), (4, 0)], 2),
        ({"cpus_per_worker": 0, "gpus_per_worker": 0.5}, [(8, 2)], 4),
    ],
)
def test_trials_at_a_time_are_those_that_fit_together(
    cluster: dict[str, Any], nodes: list[tuple[int, int]], expected: int
) -> None:
    from pipelines.search.tune import concurrent_trials

    found = concurrent_trials(ClusterConfig(**cluster), [Available(*node) for node in nodes])
    assert found == expected


@pytest.mark.parametrize(
    ("tune", "cluster", "joined", "expected", "notes"),
    [
        ({}, {}, 2, 2, 0),
        ({"concurrent": 1}, {}, 2, 1, 0),
        ({"concurrent": 4}, {}, 2, 2, 1),
        ({"concurrent": 4}, {"autoscaling": True}, 4, 4, 0),
        ({"concurrent": 4}, {"autoscaling": True}, 3, 3, 1),
    ],
)
def test_a_search_asks_for_the_nodes_of_its_trials_and_goes_on_with_what_it_gets(
    tune: dict[str, Any],
    cluster: dict[str, Any],
    joined: int,
    expected: int,
    notes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines.search import tune as module

    there, told, checked = [Available(4, 1)], [], []

    def wait(cluster: ClusterConfig, root: str, workers: int, note: Any) -> None:
        assert (cluster.autoscaling, workers) == (True, 4)
        there.extend([Available(4, 1)] * (joined - 1))
        if joined < workers:
            raise PreflightError("too few")

    if not cluster:
        there = [Available(4, 1)] * joined
    monkeypatch.setattr(module, "wait_for_nodes", wait)
    monkeypatch.setattr(module, "check_nodes", lambda *_: checked.append(1))
    monkeypatch.setattr(module, "cluster_nodes", lambda: there)
    asked = {"gpus_per_worker": 1, **cluster}
    settings = small_settings(tmp_path, tune=tune, cluster=asked)
    nodes, concurrent = module.nodes_for_trials(settings, told.append)
    assert (len(nodes), concurrent, len(told)) == (joined, expected, notes)
    assert len(checked) == bool(cluster)
    assert all("tune.concurrent is 4" in note for note in told)


def misbehave(config: dict[str, Any], task: Any, concurrent: int) -> dict[str, str]:
    """A trial without a training: its number says what goes wrong."""
    from pipelines.search.referee import EpochListener
    from pipelines.stages.spec import TrainingStopped

    number, params = config["number"], config["params"]
    mark = Path(task.settings.storage.root) / f"begun-{number}"
    first = not mark.exists()
    mark.write_text("")
    if number == 1:
        raise RuntimeError("this process is broken")
    if number == 2 and first:
        os._exit(1)
    if number == 3:
        return {OUTCOME: outcome(params, 2, "failed", "loss is nan").to_json()}
    try:
        for epoch in range(1, 4):
            listener = EpochListener(config["referee"], number, config["weight"])
            worse = {**learned(params, epoch), "holdout/top1": 0.9 - number / 10}
            listener(worse)
    except TrainingStopped as stop:
        return {OUTCOME: outcome(params, 1, "stopped", str(stop)).to_json()}
    return {OUTCOME: outcome(params, 3).to_json()}


@pytest.mark.faults
@pytest.mark.timeout(240)
def test_real_tune_goes_on_past_trials_that_raise_die_or_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: Any
) -> None:
    from pipelines.search import tune as search_tune

    same_code(monkeypatch)
    monkeypatch.setattr(search_tune, "run_trial", misbehave)
    settings = small_settings(tmp_path, stage2={"epochs": 3}, tune={"max_failures": 1})
    task = small_task(settings)
    store = Store(settings.storage.root)
    (tmp_path / "runs").mkdir(exist_ok=True)
    runs, stream = FakeRuns(), io.StringIO()
    journal = Journal(store, "searches/test")
    driver = SearchDriver(
        SearchOptions("joint", 7, kind="random", objective="top1"),
        joint(),
        task,
        journal,
        runs,  # type: ignore[arg-type]
        SearchView(stream),
        objective=SearchObjective("top1", REFERENCE),
        check=lambda own: None,
    )
    wall = search_tune.run_trials(driver, Halving(3, 1, 3), concurrent=1)
    states = {number: record.state for number, record in journal.trials.items()}
    assert states == {
        0: "finished",
        1: "failed",
        2: "finished",
        3: "failed",
        4: "stopped",
        5: "stopped",
        6: "stopped",
    }
    assert journal.trials[1].reason == ("the trial's process died 2 times (tune.max_failures)")
    assert journal.trials[3].reason == "loss is nan"
    assert "not among the best 1/3" in journal.trials[4].reason
    assert len(runs.closed) == 7
    assert driver.timing.idle(0.0, 0.0) == 0.0
    assert wall > 0
    assert not store.exists("searches/test/tune")
    again = Journal(store, "searches/test")
    assert again.trials == journal.trials
