"""The task field inside the coded number: round trips, cost, refusal of what contradicts itself."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mantis_core.bitstream.coder import RangeReader, RangeWriter
from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.bitstream.task_field import (
    TaskField,
    dequantise_level,
    put_task_field,
    quantise_log2,
    take_task_field,
)


@st.composite
def fields(draw, most_tasks=40):
    tasks = draw(st.integers(1, most_tasks))
    mask = tuple(draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks).filter(any)))
    active = [k for k in range(tasks) if mask[k]]
    primary = draw(st.sampled_from(active))
    if draw(st.booleans()):
        return TaskField(mask, primary, None)
    least = draw(st.integers(0, 15))
    levels = tuple(least if k == primary else draw(st.integers(least, 15)) for k in active)
    return TaskField(mask, primary, levels)


def coded(*fields):
    writer = RangeWriter()
    bits = sum(put_task_field(writer, field) for field in fields)
    return writer.close(), bits


@settings(max_examples=300, deadline=None)
@given(st.lists(fields(), min_size=1, max_size=5))
def test_any_fields_round_trip_one_after_the_other(several):
    data, bits = coded(*several)
    reader = RangeReader(data)
    for field in several:
        levels = field.levels is not None
        assert take_task_field(reader, len(field.mask), with_levels=levels) == field
    reader.close()
    assert len(data) <= bits / 8 * 1.001 + 2


def test_the_cost_said_is_the_cost_paid():
    field = TaskField((True, False, True, True, False, False), 2, (9, 1, 4))
    data, bits = coded(*[field] * 1000)
    assert len(data) * 8 == pytest.approx(bits, abs=16)


@pytest.mark.parametrize(
    ("tasks", "active", "most"), [(1, 1, 0.3), (10, 1, 1), (10, 2, 2), (10, 4, 4), (256, 4, 6.1)]
)
def test_a_field_costs_a_few_bytes_at_most(tasks, active, most):
    mask = tuple(k < active for k in range(tasks))
    _, bits = coded(TaskField(mask, 0, (1,) * active))
    assert bits / 8 <= most


def test_one_sure_task_of_one_costs_nothing_without_levels():
    assert coded(TaskField((True,), 0, None)) == (b"", 0.0)


@pytest.mark.parametrize(
    ("mask", "primary", "levels", "message"),
    [
        ((False, False), 0, None, "not among the active"),
        ((True, False), 1, None, "not among the active"),
        ((True, True), -1, None, "not among the active"),
        ((True, True), 0, (1,), "1 levels for 2"),
        ((True, True), 0, (3, 2), "the least"),
        ((True, True), 0, (0, 16), "0 to 15"),
        ((True, True), 0, (-1, 2), "0 to 15"),
    ],
)
def test_a_field_that_contradicts_itself_is_refused(mask, primary, levels, message):
    with pytest.raises(ValueError, match=message):
        TaskField(mask, primary, levels)


def test_random_bytes_are_a_field_or_corrupt():
    rng = np.random.default_rng(0)
    reasons = []
    for tasks in (1, 2, 3, 10, 200) * 60:
        reader = RangeReader(rng.bytes(int(rng.integers(0, 30))))
        try:
            field = take_task_field(reader, tasks, with_levels=bool(rng.integers(2)))
        except BitstreamError as error:
            reasons.append(error.reason)
        else:
            assert len(field.mask) == tasks
    assert len(reasons) > 10
    assert set(reasons) == {Reason.CORRUPT}


def test_levels_are_half_bits_and_come_back_within_a_quarter_bit():
    assert [quantise_log2(p) for p in (1.0, 0.5, 0.25, 0.0, 1.0000001, 2**-7.5)] == [
        0, 2, 4, 15, 0, 15,
    ]  # fmt: skip
    for p in np.geomspace(2**-7.5, 1, 200):
        assert abs(np.log2(dequantise_level(quantise_log2(p)) / p)) <= 0.25 + 1e-9
    assert all(quantise_log2(dequantise_level(level)) == level for level in range(16))
    with pytest.raises(ValueError, match="NaN"):
        quantise_log2(math.nan)
    with pytest.raises(ValueError, match="0 to 15"):
        dequantise_level(16)
