"""Sends live progress from Ray workers to the driver's console through a named actor."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.terminal.console import Console

logger = logging.getLogger(__name__)
BOARD_NAME = "mantis-progress"
MIN_INTERVAL_S = 0.2  # between two updates from a worker
POLL_INTERVAL_S = 0.5
_last_sent: dict[str, float] = {}
News = tuple[dict[str, dict[str, Any]], list[tuple[str, dict[str, Any]]], list[str]]
"""The newest values by stage, a (stage, figures) pair per epoch, and messages."""


class ProgressBoard:
    """Keeps the newest values of each stage, and every epoch, until the driver fetches them."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[str, Any]] = {}
        self._epochs: list[tuple[str, dict[str, Any]]] = []
        self._notes: list[str] = []

    def update(self, stage: str, values: dict[str, Any]) -> None:
        """Replaces the newest values of a stage."""
        self._latest.setdefault(stage, {}).update(values)

    def epoch(self, stage: str, values: dict[str, Any]) -> None:
        """Adds the figures of an epoch."""
        self._epochs.append((stage, values))

    def note(self, text: str) -> None:
        """Adds a message."""
        self._notes.append(text)

    def drain(self) -> News:
        """Returns what was reported since the last call."""
        news = (self._latest, self._epochs, self._notes)
        self._latest, self._epochs, self._notes = {}, [], []
        return news


def report_step(stage: str, values: Mapping[str, Any]) -> None:
    """Reports the progress of a step; rank 0 calls this in a worker.

    `values` holds for example `epoch`, `epochs`, `step`, `steps` and `train/loss`. Never blocks or
    raises. Drops updates that come within MIN_INTERVAL_S seconds.
    """
    now = time.monotonic()
    if now - _last_sent.get(stage, 0.0) >= MIN_INTERVAL_S:
        _last_sent[stage] = now
        _send("update", stage, dict(values))


def report_epoch(stage: str, values: Mapping[str, Any]) -> None:
    """Reports the end of an epoch as one line; rank 0 calls this. Never blocks or raises."""
    _send("epoch", stage, dict(values))


def report_note(text: str) -> None:
    """Sends one message to the user; rank 0 calls this in a worker. Never blocks or raises."""
    logger.warning("%s", text)
    _send("note", text)


@contextlib.contextmanager
def watch_progress(console: Console) -> Iterator[None]:
    """Shows on `console` what workers report inside the block. Ray must be connected."""
    import ray

    from pipelines.cluster.nodes import on_this_node

    board = (
        ray.remote(num_cpus=0)(ProgressBoard)
        .options(name=BOARD_NAME, scheduling_strategy=on_this_node())
        .remote()
    )
    stopped = threading.Event()

    def show() -> None:
        latest, epochs, notes = ray.get(board.drain.remote(), timeout=5)
        for text in notes:
            console.note(text)
        for stage, values in epochs:
            console.epoch(stage, values)
        for stage, values in latest.items():
            console.progress(stage, values)

    def poll() -> None:
        while not stopped.wait(POLL_INTERVAL_S):
            # The run continues if the board is busy or lost; only the display is missing.
            with contextlib.suppress(ray.exceptions.RayError):
                show()

    thread = threading.Thread(target=poll, name="mantis-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(timeout=10)
        with contextlib.suppress(ray.exceptions.RayError):
            show()
        ray.kill(board)


def _send(method: str, *news: Any) -> None:
    """Sends news to the board. Raises nothing: a training must not end because of its display."""
    import ray

    if not ray.is_initialized():
        return
    try:
        getattr(ray.get_actor(BOARD_NAME), method).remote(*news)
    except ValueError:  # there is no board: this is a test, or the driver has ended
        return
    except Exception:  # whatever Ray raises where its head or the board is being lost
        logger.info("the progress of a worker could not be shown", exc_info=True)
