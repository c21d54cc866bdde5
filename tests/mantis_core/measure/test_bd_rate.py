"""BD figures against closed forms, their refusals, their intervals, and the floor of a label."""

import numpy as np
import pytest

from mantis_core.measure.bd_rate import (
    Curve,
    CurveError,
    delta_accuracy,
    delta_rate,
    efficient,
    label_floor_bits,
    over_seeds,
    size_at,
    t_interval,
)

SIZES = np.array([20.0, 40.0, 80.0, 160.0])
LINE = np.stack([SIZES, 20 + 10 * np.log2(SIZES / 20)], axis=1)


@pytest.mark.parametrize("factor", [0.5, 0.85, 1.0, 1.3])
def test_the_same_curve_at_a_multiple_of_the_bytes_has_that_bd_rate(factor: float) -> None:
    moved = LINE * np.array([factor, 1.0])
    assert delta_rate(LINE, moved) == pytest.approx(100 * (factor - 1), abs=1e-9)


def test_the_size_at_an_accuracy_lies_between_neighbouring_points_and_never_beyond_the_ends() -> (
    None
):
    assert size_at(LINE, 25.0) == pytest.approx(20 * 2**0.5)
    assert size_at(LINE, 20.0) == pytest.approx(20.0)
    assert size_at(LINE, 19.9) is None
    assert size_at(LINE, 50.1) is None


def test_a_curve_three_points_higher_has_that_bd_accuracy() -> None:
    assert delta_accuracy(LINE, LINE + np.array([0.0, 3.0])) == pytest.approx(3.0)
    assert delta_accuracy(LINE, LINE) == pytest.approx(0.0)


def test_points_no_better_than_a_smaller_one_are_left_out() -> None:
    points = np.array([[40.0, 30], [20, 20], [60, 29], [80, 40], [80, 41]])
    assert efficient(points).tolist() == [[20, 20], [40, 30], [80, 40]]


def test_too_few_points_and_too_narrow_a_range_are_refused() -> None:
    with pytest.raises(CurveError, match="first curve has 3 points that rise, 4 are needed"):
        delta_rate(LINE[:3], LINE)
    with pytest.raises(CurveError, match="second curve has 3 points"):
        delta_rate(LINE, np.vstack([LINE[:3], [200, 1]]))
    with pytest.raises(CurveError, match=r"share 5\.0 points of top1, 8 are needed"):
        delta_rate(LINE, LINE + np.array([0.0, 25.0]))
    with pytest.raises(CurveError, match="no common range of bytes"):
        delta_accuracy(LINE, LINE * np.array([1000.0, 1.0]))


def drawn_curve(seed: int, factor: float, images: int = 2000) -> Curve:
    """Curves as LINE's, their bytes times `factor`, with the noise of images and seeds."""
    rng = np.random.default_rng(seed)
    difficulty = np.random.default_rng(7).uniform(size=images)  # the same images for every arm
    sizes = factor * SIZES[:, None] * rng.uniform(0.8, 1.2, (4, images))
    hits = difficulty[None] < LINE[:, 1:] / 100 + rng.normal(0, 0.03, (4, images))
    return Curve(sizes, hits)


def test_an_interval_holds_the_truth_and_the_seeds_own_values() -> None:
    anchors = [drawn_curve(seed, 1.0) for seed in range(3)]
    tests = [drawn_curve(seed + 10, 0.8) for seed in range(3)]
    found = over_seeds(anchors, tests)
    assert len(found.seeds) == 3
    assert found.mean == pytest.approx(np.mean(found.seeds))
    assert found.low < found.mean < found.high
    assert found.low < -20 < found.high < 0
    better = over_seeds(anchors, tests, accuracy=True)
    assert 0 < better.low < better.mean < better.high


def test_a_range_that_just_suffices_has_an_interval_too() -> None:
    difficulty = (np.arange(2000) + 0.5) / 2000
    right = difficulty[None] < np.array([0.200, 0.227, 0.254, 0.281])[:, None]
    sizes = np.broadcast_to(SIZES[:, None], right.shape)
    others = np.roll(right, 1000, axis=1)  # the same points; images drawn anew part them
    found = over_seeds([Curve(sizes, right)], [Curve(0.8 * sizes, others)])
    assert found.mean == pytest.approx(-20)
    assert found.low < -20 < found.high


def test_no_difference_has_an_interval_around_zero() -> None:
    anchors = [drawn_curve(seed, 1.0) for seed in range(3)]
    tests = [drawn_curve(seed + 10, 1.0) for seed in range(3)]
    found = over_seeds(anchors, tests)
    assert found.low < 0 < found.high


@pytest.mark.parametrize(
    ("classes", "accuracy", "bits"),
    [(2, 0.76, 0.20), (10, 0.9, 2.54), (100, 0.7, 3.77), (1000, 0.76, 6.78), (100, 1.0, 6.64)],
)
def test_the_floor_of_a_label_is_that_of_the_formula(
    classes: int, accuracy: float, bits: float
) -> None:
    assert label_floor_bits(classes, accuracy) == pytest.approx(bits, abs=0.006)


def test_guessing_needs_no_bits() -> None:
    assert label_floor_bits(10, 0.1) == 0.0
    assert label_floor_bits(10, 0.0) == 0.0
    assert label_floor_bits(1, 1.0) == 0.0


def test_a_seed_measured_twice_tells_no_more_about_images_than_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mantis_core.measure.bd_rate.REPLICATES", 300)
    anchor, test = drawn_curve(0, 1.0, images=500), drawn_curve(10, 0.8, images=500)
    once = over_seeds([anchor], [test])
    twice = over_seeds([anchor, anchor], [test, test])
    assert twice.mean == pytest.approx(once.mean)
    assert twice.high - twice.low == pytest.approx(once.high - once.low, rel=0.2)


def test_a_t_interval_over_seeds_stands_beside_the_bootstraps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mantis_core.measure.bd_rate.REPLICATES", 20)
    anchors = [drawn_curve(seed, 1.0) for seed in range(3)]
    tests = [drawn_curve(seed + 10, 0.8) for seed in range(3)]
    found = over_seeds(anchors, tests)
    assert found.over_seeds == t_interval(found.seeds)
    assert over_seeds(anchors[:1], tests[:1]).over_seeds is None


def test_the_t_interval_is_that_of_the_table() -> None:
    low, high = t_interval([1.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    low, high = t_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)
    assert t_interval([1.0]) is None
