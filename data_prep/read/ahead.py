"""Begins an epoch's reading while the training is still busy with the one before. Reads nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import chain, islice
from typing import TypeVar

Item = TypeVar("Item")
Begun = tuple[list[Item], Iterator[Item]]


def begun_ahead(
    begin: Callable[[int], Iterator[Item]], *, steps: int, epochs: int
) -> Callable[[int], Iterator[Item]]:
    """Returns `begin`, made faster for epochs that are read one after the other.

    `begin(epoch)` yields the `steps` batches of an epoch. As soon as the last of them is taken, a
    thread asks for the first batch of the next epoch, if that is below `epochs`. The reading of
    both epochs never overlaps, so the second one takes no CPU that the first one waits for. An
    error of the thread is raised where its epoch is iterated.
    """
    waiting: dict[int, Future[Begun[Item]]] = {}

    def batches(epoch: int) -> Iterator[Item]:
        ready = waiting.pop(epoch, None)
        first, others = _begun(begin, epoch) if ready is None else ready.result()
        for number, batch in enumerate(chain(first, others), 1):
            if number == steps and epoch + 1 < epochs:
                waiting[epoch + 1] = _in_a_thread(begin, epoch + 1)
            yield batch

    return batches


def _begun(begin: Callable[[int], Iterator[Item]], epoch: int) -> Begun[Item]:
    """Returns the first batch, if there is one, and the iterator of the others."""
    batches = iter(begin(epoch))
    return list(islice(batches, 1)), batches


def _in_a_thread(begin: Callable[[int], Iterator[Item]], epoch: int) -> Future[Begun[Item]]:
    """Begins an epoch in a thread that does not keep the process from ending."""
    future: Future[Begun[Item]] = Future()

    def work() -> None:
        try:
            future.set_result(_begun(begin, epoch))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="mantis-next-epoch", daemon=True).start()
    return future
