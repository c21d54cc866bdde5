"""The replay of searches: both arms on one table, budgets counted, the table read back whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.search import (
    RANDOM_TRIALS,
    Row,
    compare,
    distance,
    rank_correlation,
    read_table,
    replay_random,
    replay_search,
    write_table,
)
from pipelines.search.sampler import propose
from pipelines.settings.sections import TuneConfig
from tests.pipelines.search_bench import PARETO, joint, learned

EPOCHS = 9


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """128 configurations whose curves follow a formula, with noise."""
    noise, found = random.Random(0), []
    for number in range(128):
        params = propose(
            joint(), (), number, kind="random", objective=PARETO, seed=0, startup_trials=1
        )
        luck = noise.gauss(1, 0.02)
        epochs = []
        for epoch in range(1, EPOCHS + 1):
            figures = learned(params, epoch, EPOCHS)
            epochs.append({**figures, "holdout/top1": figures["holdout/top1"] * luck})
        found.append(Row(params, tuple(epochs)))
    return found


def test_a_table_reads_back_as_it_was_written(rows: list[Row], tmp_path: Path) -> None:
    write_table(tmp_path / "table.csv", rows[:3])
    again = read_table(tmp_path / "table.csv")
    assert [row.params for row in again] == [row.params for row in rows[:3]]
    assert [row.final for row in again] == [row.final for row in rows[:3]]
    assert len(again[0].epochs) == EPOCHS


def test_the_random_arm_trains_64_rows_to_their_end(rows: list[Row]) -> None:
    replay, corner = replay_random(rows, 0)
    assert replay.steps[-1][0] == RANDOM_TRIALS * EPOCHS
    volumes = [volume for _, volume in replay.steps]
    assert volumes == sorted(volumes)
    assert corner.top1 > 0
    assert replay_random(rows, 0)[0] == replay
    assert replay_random(rows, 1)[0] != replay


def test_our_arm_counts_the_epochs_of_stopped_rows_and_takes_no_row_twice(
    rows: list[Row],
) -> None:
    _, corner = replay_random(rows, 0)
    budget = 120
    ours = replay_search(rows, joint(), TuneConfig(), 0, corner, budget)
    full = replay_search(rows, joint(), TuneConfig(stop_early=False), 0, corner, budget)
    assert ours.begun > full.begun == full.finished == -(-budget // EPOCHS)
    assert ours.finished < ours.begun
    used = ours.finished * EPOCHS + (ours.begun - ours.finished)
    assert ours.steps[-1][0] >= ours.finished * EPOCHS
    assert used <= budget + EPOCHS
    whole = replay_search(rows, joint(), TuneConfig(), 0, corner, 10_000)
    assert whole.begun == len(rows)


def test_both_arms_are_compared_for_every_seed_and_the_worst_is_told(rows: list[Row]) -> None:
    found = compare(rows, joint(), TuneConfig(), range(2))
    assert found["hypervolume_ratio"] == min(s["hypervolume_ratio"] for s in found["seeds"])
    assert [each["seed"] for each in found["seeds"]] == [0, 1]
    assert found["configurations"] == 128
    for each in found["seeds"]:
        assert each["hypervolume_ratio"] > each["random_at_budget"] - 0.05
        assert 0.5 < each["hypervolume_ratio"] < 1.5


def test_ranks_after_few_epochs_agree_with_the_last(rows: list[Row]) -> None:
    assert rank_correlation(rows, EPOCHS) == {"wire_bytes": 1.0, "top1": 1.0}
    assert rank_correlation(rows, 1)["wire_bytes"] == pytest.approx(1.0, abs=1e-3)


def test_distance_is_0_at_home_and_1_across_one_field(rows: list[Row]) -> None:
    params = dict(rows[0].params)
    assert distance(joint(), params, params) == 0
    other = {**params, "stage2.rate_weight": 3e-4}
    far = {**params, "stage2.rate_weight": 3e-2}
    assert distance(joint(), other, far) == pytest.approx(1)
