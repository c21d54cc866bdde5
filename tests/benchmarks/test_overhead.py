"""What is made of the clock of two trainings."""

from __future__ import annotations

import pytest

from benchmarks.overhead import Times, ratios, times_of


def test_the_warm_up_of_every_epoch_counts_for_whole_epochs_alone() -> None:
    clock = [[0.0, 5.0, 6.0, 7.0, 10.0], [20.0, 29.0, 30.0, 31.0, 32.0]]
    found = times_of(clock, warm_up=2)
    assert found.median == 1.0
    assert found.mean == pytest.approx((1 + 3 + 1 + 1) / 4)
    assert found.epoch == pytest.approx((10 + 12) / 8)


def test_too_short_an_epoch_is_refused() -> None:
    with pytest.raises(ValueError, match="no epoch has more than 3 steps"):
        times_of([[0.0, 1.0, 2.0, 3.0]], warm_up=3)


def test_ratios_are_medians_over_pairs() -> None:
    plain = Times(1.0, 2.0, 4.0)
    slow = Times(9.0, 9.0, 9.0)
    pairs = [(Times(1.1, 2.0, 5.0), plain), (Times(1.0, 3.0, 6.0), plain), (slow, plain)]
    assert ratios(pairs) == {"step_ratio": 1.1, "mean_ratio": 1.5, "epoch_ratio": 1.5}
