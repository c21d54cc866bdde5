"""The comparison of worker counts: hashes by seed, differences paired by seed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.workers import Run, paired, read_run, same_hashes, show, summary


def some_runs() -> list[Run]:
    top1 = {(1, 0): 0.70, (1, 1): 0.60, (1, 2): 0.65, (2, 0): 0.71, (2, 1): 0.62, (2, 2): 0.65}
    hashes = {seed: {"stage1": (f"a{seed}", f"b{seed}")} for seed in range(3)}
    return [Run(workers, seed, value, hashes[seed]) for (workers, seed), value in top1.items()]


def test_a_run_is_read_from_what_the_command_prints() -> None:
    result = {
        "stages": {
            "prepare": {"rows": {"train": 100}},
            "stage2": {"rows": {"per_epoch": 96, "left_out": 4, "sha256": ["x", "y"]}},
            "evaluate": {"rows": {}},
        },
        "metrics": {"val/top1": 0.5},
    }
    assert read_run(result, 2, 7) == Run(2, 7, 0.5, {"stage2": ("x", "y")})


def test_differences_are_paired_by_seed() -> None:
    found = paired(some_runs(), 2, 1)
    assert found.differences == pytest.approx((0.01, 0.02, 0.0))
    assert found.mean == pytest.approx(0.01)
    assert found.standard_error == pytest.approx(0.01 / 3**0.5)
    assert found.within
    biased = [Run(2, seed, 0.7 + 0.001 * seed, {}) for seed in range(3)]
    biased += [Run(1, seed, 0.6, {}) for seed in range(3)]
    assert not paired(biased, 2, 1).within


def test_one_seed_has_a_difference_and_no_error() -> None:
    found = paired(some_runs()[::3], 2, 1)
    assert found.standard_error is found.within is None
    assert found.mean == pytest.approx(0.01)


def test_hashes_must_agree_within_a_seed_alone() -> None:
    runs = some_runs()
    assert same_hashes(runs)
    assert not same_hashes([*runs, Run(4, 1, 0.6, {"stage1": ("a1", "other")})])


def test_the_summary_and_the_table_hold_every_run() -> None:
    found = summary(some_runs())
    assert found["same_hash"]
    assert found["top1"]["2"] == {"0": 0.71, "1": 0.62, "2": 0.65}
    assert found["paired"]["2"]["within"]
    stream = io.StringIO()
    show(some_runs(), Console(file=stream, width=120))
    assert "+0.0100" in stream.getvalue()
    assert "the same" in stream.getvalue()
