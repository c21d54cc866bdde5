"""Points, fronts, hypervolume and halving, against values worked out by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mantis_core.bitstream import container as bitstream
from pipelines.commands.tune import Objective, Search
from pipelines.search.points import (
    CONTAINER_BYTES,
    OBJECTIVES,
    Halving,
    RdPoint,
    SearchObjective,
    hypervolume,
    pareto_front,
    rd_points,
    scalar_cost,
    spread,
    worst_corner,
)
from pipelines.search.sampler import SearchKind

CORNER = RdPoint(1000.0, 0.0)
POINTS = st.lists(
    st.builds(RdPoint, st.floats(1.0, 999.0), st.floats(0.01, 1.0)), min_size=1, max_size=12
)


def figures(bits: float, top1: float, **others: float) -> dict[str, float]:
    return {"epoch": 1.0, "holdout/bits": bits, "holdout/top1": top1, **others}


def test_bytes_are_payload_and_container() -> None:
    assert rd_points(figures(80, 0.5)) == (RdPoint(10 + CONTAINER_BYTES, 0.5),)
    header = bitstream._HEADER_BYTES + bitstream._CHECKSUM_BYTES
    assert header == CONTAINER_BYTES


@pytest.mark.parametrize("bad", [{"holdout/bits": math.nan}, {"holdout/top1": math.inf}])
def test_an_epoch_without_numbers_has_no_point(bad: dict[str, float]) -> None:
    assert rd_points({**figures(80, 0.5), **bad}) == ()
    assert SearchObjective("pareto", CORNER).losses({**figures(80, 0.5), **bad}) is None
    assert rd_points({"holdout/bits": 80.0}) == ()


def of_levels(**points: tuple[float, float]) -> dict[str, float]:
    levels = {
        f"holdout/{level.replace('_', '-')}/{name}": value
        for level, pair in points.items()
        for name, value in zip(("bits", "top1"), pair, strict=True)
    }
    return {**figures(100, 0.6), **levels}


def test_a_model_of_several_rates_has_a_point_of_each() -> None:
    both = of_levels(level_16=(80, 0.5), level_0=(480, 0.8), level_4=(160, 0.6))
    assert rd_points(both) == (
        RdPoint(60 + CONTAINER_BYTES, 0.8, 0),
        RdPoint(20 + CONTAINER_BYTES, 0.6, 4),
        RdPoint(10 + CONTAINER_BYTES, 0.5, 16),
    )
    assert rd_points(of_levels(level_0=(480, 0.8), level_4=(math.nan, 0.6))) == ()
    del both["holdout/level-4/top1"]
    assert rd_points(both) == ()


def test_a_trial_of_several_rates_is_judged_by_its_own_front() -> None:
    objective = SearchObjective("pareto", CORNER, levels=True)
    trial = of_levels(level_0=(712, 0.8), level_4=(-8, 0.5))  # 100 and 10 bytes
    assert objective.losses(trial) == pytest.approx((-(1 * 0.5 + 1 * 0.8),))
    better = of_levels(level_0=(712, 0.8), level_4=(-8, 0.6))
    assert (objective.losses(better) or ()) < (objective.losses(trial) or ())
    assert objective.dimensions == 1
    assert SearchObjective("top1", CORNER, levels=True).losses(trial) == (-0.6,)


def test_searches_are_those_the_command_line_offers() -> None:
    assert set(get_args(Search)) == set(get_args(SearchKind))


def test_objectives_are_those_the_command_line_offers_and_less_is_better() -> None:
    assert set(get_args(Objective)) == set(OBJECTIVES)
    worse, better = figures(88, 0.4, **{"holdout/loss": 2.0}), figures(80, 0.5)
    better["holdout/loss"] = 1.0
    for objective in OBJECTIVES:
        of = SearchObjective(objective, CORNER)
        pairs = zip(of.losses(better) or (), of.losses(worse) or (), strict=True)
        assert of.dimensions == len(of.losses(better) or ())
        assert all(good < bad for good, bad in pairs)


def test_an_objective_without_its_figure_is_none() -> None:
    assert SearchObjective("loss", CORNER).losses(figures(80, 0.5)) is None


def test_the_front_rises_in_both() -> None:
    points = {
        0: RdPoint(20, 0.5),
        1: RdPoint(10, 0.4),
        2: RdPoint(30, 0.5),
        3: RdPoint(40, 0.9),
        4: RdPoint(20, 0.3),
        5: RdPoint(10, 0.4),
    }
    assert pareto_front(points) == [1, 0, 3]


@given(POINTS)
def test_no_point_of_a_front_is_beaten_and_every_other_is(points: list[RdPoint]) -> None:
    numbered = dict(enumerate(points))
    front = pareto_front(numbered)
    for number, point in numbered.items():
        beaten = any(
            other.wire_bytes <= point.wire_bytes
            and other.top1 >= point.top1
            and (other != point or key < number)
            for key, other in numbered.items()
            if key != number
        )
        assert (number in front) != beaten


def test_hypervolume_is_the_area_of_the_steps() -> None:
    points = [RdPoint(10, 0.5), RdPoint(100, 0.8), RdPoint(500, 0.6)]
    assert hypervolume(points, CORNER) == pytest.approx(1 * 0.5 + 1 * 0.8)
    assert hypervolume(points, RdPoint(1000, 0.5)) == pytest.approx(0.3)
    assert hypervolume([], CORNER) == 0


def test_what_lies_beyond_the_reference_counts_for_nothing() -> None:
    assert hypervolume([RdPoint(2000, 0.9), RdPoint(10, -0.1)], CORNER) == 0


@given(POINTS, st.builds(RdPoint, st.floats(1.0, 999.0), st.floats(0.01, 1.0)))
def test_a_further_point_never_lessens_the_hypervolume(
    points: list[RdPoint], further: RdPoint
) -> None:
    before, after = hypervolume(points, CORNER), hypervolume([*points, further], CORNER)
    assert after >= before - 1e-12
    alone = hypervolume([further], CORNER)
    assert after <= before + alone + 1e-12


def test_the_worst_corner_is_most_bytes_and_lowest_top1() -> None:
    assert worst_corner([RdPoint(10, 0.4), RdPoint(30, 0.9)]) == RdPoint(30, 0.4)


def test_a_spread_of_the_front_keeps_what_covers_most() -> None:
    points = {
        0: RdPoint(10, 0.5),
        1: RdPoint(11, 0.501),
        2: RdPoint(100, 0.8),
        3: RdPoint(50, 0.1),
    }
    assert spread(points, 2, CORNER) == [0, 2]
    assert spread(points, 9, CORNER) == [0, 1, 2]


def test_a_cost_weighs_objectives_within_the_bounds_seen() -> None:
    low, high = (1.0, -0.9), (3.0, -0.1)
    cheap, good = (1.0, -0.1), (3.0, -0.9)
    assert scalar_cost(cheap, 0.9, low, high) < scalar_cost(good, 0.9, low, high)
    assert scalar_cost(cheap, 0.1, low, high) > scalar_cost(good, 0.1, low, high)
    assert scalar_cost((7.0,), 0.3, (0.0,), (9.0,)) == 7.0


def test_a_cost_where_all_are_equal_is_a_number() -> None:
    assert math.isfinite(scalar_cost((1.0, 2.0), 0.5, (1.0, 2.0), (1.0, 2.0)))


def test_rungs_are_before_the_last_epoch() -> None:
    assert Halving(9, 1, 3).rungs == (1, 3)
    assert Halving(10, 1, 3).rungs == (1, 3, 9)
    assert Halving(2, 1, 3).rungs == (1,)
    assert Halving(1, 1, 3).rungs == ()


def test_of_three_trials_at_a_rung_the_best_goes_on() -> None:
    halving = Halving(9, 1, 3)
    assert halving.goes_on((2.0,), [], 0.5)
    assert halving.goes_on((9.0,), [(1.0,)], 0.5)
    assert halving.goes_on((1.0,), [(2.0,), (3.0,)], 0.5)
    assert not halving.goes_on((2.5,), [(2.0,), (3.0,)], 0.5)


def test_a_trial_is_judged_by_its_own_weight() -> None:
    halving, others = Halving(9, 1, 3), [(0.9, -0.2), (2.0, -0.9), (2.2, -0.5), (2.5, -0.1)]
    cheap = (1.0, -0.1)
    assert halving.goes_on(cheap, [*others, (3.0, -0.05)], 0.99)
    assert not halving.goes_on(cheap, [*others, (3.0, -0.05)], 0.01)


def test_a_trial_that_no_other_beats_goes_on_whatever_its_weight() -> None:
    halving, others = Halving(9, 1, 3), [(2.0, -0.9), (2.2, -0.5), (2.1, -0.8)]
    for weight in (0.01, 0.5, 0.99):
        assert halving.goes_on((1.0, -0.1), others, weight)
        assert not halving.goes_on((2.3, -0.4), others, weight)


@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=30, unique=True), st.integers(2, 4))
def test_one_in_factor_would_go_on(losses: list[float], factor: int) -> None:
    halving = Halving(9, 1, factor)
    kept = sum(
        halving.goes_on((loss,), [(other,) for other in losses if other != loss], 0.5)
        for loss in losses
    )
    few = len(losses) < factor
    assert kept == (len(losses) if few else len(losses) // factor)
