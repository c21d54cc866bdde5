"""Proposals: repeatable, learning from what is known, never confused by trials that failed."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

from pipelines.search.journal import TrialRecord
from pipelines.search.points import SearchObjective
from pipelines.search.sampler import importances, propose, random_weight, study_of
from tests.pipelines.search_bench import PARETO, REFERENCE, joint, learned


def record(number: int, *, seed: int = 0, epochs: int = 9, state: str = "finished") -> TrialRecord:
    params = ask((), number, seed=seed, kind="random")
    history = {epoch: learned(params, epoch) for epoch in range(1, epochs + 1)}
    done = TrialRecord(number, params, 0.5, epochs=history)
    return replace(done, state=state, figures=history[epochs] if state == "finished" else {})


def ask(records, number, *, seed=0, kind="optuna", objective="pareto", attempt=0):
    return propose(
        joint(),
        records,
        number,
        kind=kind,
        objective=SearchObjective(objective, REFERENCE),
        seed=seed,
        startup_trials=4,
        attempt=attempt,
    )


@pytest.mark.parametrize("objective", ["pareto", "top1"])
def test_a_proposal_depends_on_records_seed_and_number_alone(objective: str) -> None:
    records = [record(number) for number in range(8)]
    first = ask(records, 8, objective=objective)
    assert ask(records, 8, objective=objective) == first
    assert ask(records, 9, objective=objective) != first
    assert ask(records, 8, objective=objective, seed=1) != first
    assert ask(records, 8, objective=objective, attempt=1) != first


def test_the_search_learns_what_the_objective_likes() -> None:
    """The fewest bits go with the largest rate weights; a random search keeps to the middle."""
    records = [record(number) for number in range(16)]
    for number in range(16, 40):
        params = ask(records, number, objective="bits")
        history = {epoch: learned(params, epoch) for epoch in range(1, 10)}
        records.append(
            TrialRecord(number, params, 0.5, epochs=history, state="finished", figures=history[9])
        )
    asked = [r.params["stage2.rate_weight"] for r in records]
    assert median(asked[28:]) > 2 * median(asked[:16])


def test_weights_are_spread_over_the_whole_range() -> None:
    weights = [random_weight(0, number) for number in range(200)]
    assert min(weights) < 0.05
    assert max(weights) > 0.95
    assert random_weight(0, 7) == weights[7]
    assert random_weight(1, 7) != weights[7]


def test_optuna_hears_of_failures_and_of_what_runs() -> None:
    records = [
        record(0),
        record(1, epochs=3, state="stopped"),
        record(2, state="failed"),
        replace(record(3), state="running", epochs={}, figures={}),
        replace(record(4), state="equal", epochs={}, figures={}),
    ]
    states = [trial.state.name for trial in study_of(joint(), records, PARETO).trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING", "FAIL"]


def test_what_matters_is_found_at_one_epoch_and_adds_up_to_one() -> None:
    records = [record(number, epochs=1 if number % 2 else 9) for number in range(24)]
    found = importances(joint(), records, REFERENCE, epoch=1)
    assert set(found) == {"bits", "top1"}
    for shares in found.values():
        assert sum(shares.values()) == pytest.approx(1)
    assert max(found["bits"], key=lambda key: found["bits"][key]) == "stage2.rate_weight"


def test_too_few_trials_tell_nothing_of_what_matters() -> None:
    assert importances(joint(), [record(0), record(1)], REFERENCE, epoch=1) == {}
