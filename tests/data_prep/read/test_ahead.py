"""Epochs that are begun ahead: the same batches, and the next one begins with the last batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from data_prep.read.ahead import begun_ahead

STEPS = 3
PATIENCE_S = 20.0


class Reading:
    """Batches named by epoch and step, and a note of each epoch that was begun."""

    def __init__(self) -> None:
        self.begun = [threading.Event() for _ in range(4)]

    def __call__(self, epoch: int) -> Iterator[str]:
        self.begun[epoch].set()
        for step in range(STEPS):
            yield f"{epoch}.{step}"


def test_every_epoch_has_its_batches_in_order() -> None:
    batches = begun_ahead(Reading(), steps=STEPS, epochs=3)
    found = [list(batches(epoch)) for epoch in (0, 1, 2)]
    assert found == [[f"{epoch}.{step}" for step in range(STEPS)] for epoch in range(3)]


def test_the_next_epoch_begins_with_the_last_batch_and_not_before() -> None:
    reading = Reading()
    epoch = begun_ahead(reading, steps=STEPS, epochs=2)(0)
    assert [next(epoch), next(epoch)] == ["0.0", "0.1"]
    assert not reading.begun[1].is_set()
    assert next(epoch) == "0.2"
    assert reading.begun[1].wait(PATIENCE_S)


def test_nothing_is_begun_after_the_last_epoch() -> None:
    reading = Reading()
    assert len(list(begun_ahead(reading, steps=STEPS, epochs=2)(1))) == STEPS
    assert "mantis-next-epoch" not in [thread.name for thread in threading.enumerate()]
    assert not reading.begun[2].is_set()


def test_an_epoch_that_was_not_begun_ahead_is_read_all_the_same() -> None:
    batches = begun_ahead(Reading(), steps=STEPS, epochs=9)
    assert next(batches(0)) == "0.0"
    assert list(batches(2)) == ["2.0", "2.1", "2.2"]


def test_an_error_of_the_thread_is_raised_where_the_epoch_is_read() -> None:
    def read(epoch: int) -> Iterator[str]:
        if epoch == 1:
            raise ValueError("a damaged shard")
        yield from ("a", "b")

    batches = begun_ahead(read, steps=2, epochs=2)
    assert list(batches(0)) == ["a", "b"]
    with pytest.raises(ValueError, match="a damaged shard"):
        next(batches(1))


def test_an_epoch_without_batches_stays_empty() -> None:
    batches = begun_ahead(lambda epoch: iter(()), steps=1, epochs=2)
    assert list(batches(0)) == []
