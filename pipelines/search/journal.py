"""Keeps the journal of a search: one file per event, never rewritten.

A search is resumed from its journal alone. Each event is written whole or not at all, so the
journal stays readable if the process is killed at any moment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipelines.search.points import RdPoint, rd_points
from pipelines.search.space import Params
from pipelines.stages.record import locked
from pipelines.storage import Store

TrialState = Literal["running", "finished", "stopped", "failed", "equal"]
FOLDER = "journal"


@dataclass(frozen=True)
class TrialRecord:
    """Holds the state of a trial so far.

    `weight` is the random weight of the first objective in the trial's scalar cost. `keys` maps
    stage to key. `epochs` maps each epoch of stage 2 to its figures; `figures` are those of the
    final weights. `run_id` is the MLflow run. `began` and `ended` are Unix seconds.
    """

    number: int
    params: Params
    weight: float
    keys: Mapping[str, str] = field(default_factory=dict)
    run_id: str | None = None
    state: TrialState = "running"
    reason: str = ""
    epochs: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    began: float = 0.0
    ended: float | None = None

    @property
    def points(self) -> tuple[RdPoint, ...]:
        """Returns the final rate-accuracy points, or those of the last epoch while it runs.

        One, or one of each rate of a model of several; empty before the first epoch.
        """
        last = self.epochs[max(self.epochs)] if self.epochs else {}
        return rd_points(self.figures or last)


def finished_points(trials: Mapping[int, TrialRecord]) -> dict[tuple[int, int], RdPoint]:
    """Returns the points of the trials that trained all their epochs.

    The keys are trial number and level, which is 0 for a model of one rate.
    """
    return {
        (number, point.level or 0): point
        for number, record in trials.items()
        if record.state == "finished"
        for point in record.points
    }


class Journal:
    """Reads and appends the events of one search in `<root>/<folder>/journal`.

    `trials` is the state after all events.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder
        self.trials: dict[int, TrialRecord] = {}
        names = [name for name in store.list(f"{folder}/{FOLDER}") if not name.startswith(".")]
        for name in names:
            self._apply(store.read_json(f"{folder}/{FOLDER}/{name}"))
        self._next = int(names[-1].partition(".")[0]) + 1 if names else 1

    def asked(self, record: TrialRecord) -> None:
        """Records a new trial. Called before any of its stages runs."""
        self._append(
            {
                "event": "asked",
                "trial": record.number,
                "params": dict(record.params),
                "weight": record.weight,
                "keys": dict(record.keys),
                "run_id": record.run_id,
            }
        )

    def epoch(self, trial: int, figures: Mapping[str, float]) -> None:
        """Records an epoch of stage 2, unless it is recorded already."""
        if int(figures["epoch"]) not in self.trials[trial].epochs:
            self._append({"event": "epoch", "trial": trial, "figures": dict(figures)})

    def ended(
        self,
        trial: int,
        state: TrialState,
        reason: str = "",
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Records the end of a trial. `figures` are those of its final weights, if it finished."""
        record = {"state": state, "reason": reason, "figures": dict(figures or {})}
        self._append({"event": "ended", "trial": trial, **record})

    def _append(self, event: dict[str, Any]) -> None:
        event = {**event, "time": round(time.time(), 3)}
        self.store.write_json(f"{self.folder}/{FOLDER}/{self._next:08d}.json", event)
        self._next += 1
        self._apply(event)

    def _apply(self, event: Mapping[str, Any]) -> None:
        number, when = event["trial"], event["time"]
        if event["event"] == "asked":
            self.trials[number] = TrialRecord(
                number=number,
                params=event["params"],
                weight=event["weight"],
                keys=event["keys"],
                run_id=event["run_id"],
                began=when,
            )
            return
        record = self.trials[number]
        if event["event"] == "epoch":
            figures = event["figures"]
            epochs = {**record.epochs, int(figures["epoch"]): figures}
            self.trials[number] = replace(record, epochs=epochs)
        else:
            self.trials[number] = replace(
                record,
                state=event["state"],
                reason=event["reason"],
                figures=event["figures"],
                ended=when,
            )


@contextmanager
def open_journal(store: Store, folder: str) -> Iterator[Journal]:
    """Opens the journal for one writer. The lock is released even if the process crashes.

    Raises StageBusy if another process has it open.
    """
    with locked(store, folder, "this search"):
        yield Journal(store, folder)
