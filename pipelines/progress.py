"""Live progress from Ray workers to the driver's console: one small named actor between them."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.console import Console

logger = logging.getLogger(__name__)

BOARD_NAME = "mantis-progress"
MIN_INTERVAL_S = 0.2  # between two updates a worker sends
POLL_INTERVAL_S = 0.5

_last_sent: dict[str, float] = {}

News = tuple[dict[str, dict[str, Any]], list[tuple[str, dict[str, Any]]], list[str]]
"""By stage its newest values; (stage, figures) of epochs; messages."""


class ProgressBoard:
    """Holds the newest values of each stage until the driver fetches them, and every epoch."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[str, Any]] = {}
        self._epochs: list[tuple[str, dict[str, Any]]] = []
        self._notes: list[str] = []

    def update(self, stage: str, values: dict[str, Any]) -> None:
        self._latest.setdefault(stage, {}).update(values)

    def epoch(self, stage: str, values: dict[str, Any]) -> None:
        self._epochs.append((stage, values))

    def note(self, text: str) -> None:
        self._notes.append(text)

    def drain(self) -> News:
        """What came since the last call."""
        news = (self._latest, self._epochs, self._notes)
        self._latest, self._epochs, self._notes = {}, [], []
        return news


def report_step(stage: str, values: Mapping[str, Any]) -> None:
    """Called by rank 0 in a worker: shows values such as {"epoch", "epochs", "step", "steps",
    "train/loss"}. Never blocks, never raises; updates that follow too fast are dropped."""
    now = time.monotonic()
    if now - _last_sent.get(stage, 0.0) >= MIN_INTERVAL_S:
        _last_sent[stage] = now
        _send("update", stage, dict(values))


def report_epoch(stage: str, values: Mapping[str, Any]) -> None:
    """Called by rank 0 at the end of an epoch: one printed line. Never blocks, never raises."""
    _send("epoch", stage, dict(values))


def report_note(text: str) -> None:
    """Called by rank 0 in a worker: one message to who runs the command. Never blocks or raises."""
    logger.warning("%s", text)
    _send("note", text)


@contextlib.contextmanager
def watch_progress(console: Console) -> Iterator[None]:
    """Shows on `console` what workers report while the block runs. Ray must be connected."""
    import ray

    from pipelines.cluster import on_this_node  # not needed where news are only sent

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
            # A busy or lost board costs a glance at the progress, never the run.
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
    import ray

    if not ray.is_initialized():
        return
    try:
        board = ray.get_actor(BOARD_NAME)
    except ValueError:  # nobody watches: a worker in a test, or the driver has gone
        return
    getattr(board, method).remote(*news)
