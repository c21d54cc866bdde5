"""Who may train on: the Ray actor that judges epochs of trials, and what asks it in a training.

Judging is `Halving`'s; this file keeps the points of each rung where all trials reach them. The
driver fetches what was reported and writes the journal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.search_journal import TrialRecord
from pipelines.search_points import Figures, Halving, Losses, losses_of
from pipelines.stages import TrainingStopped

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """What an epoch brought. One that does not go on is stopped, or broken: it has no point."""

    trial: int
    figures: Figures
    goes_on: bool = True
    broken: bool = False
    reason: str = ""


class Referee:
    """Points by rung and trial. Starts with those of the journal, so a resumed search goes on."""

    def __init__(self, halving: Halving | None, objective: str) -> None:
        self._halving, self._objective = halving, objective
        self._rungs: dict[int, dict[int, Losses]] = {}
        self._news: list[Verdict] = []

    def recall(self, records: Iterable[TrialRecord]) -> None:
        """Takes the epochs that were judged before."""
        for record in records:
            for epoch, figures in record.epochs.items():
                losses = losses_of(figures, self._objective)
                if losses is not None:
                    self._rungs.setdefault(epoch, {})[record.number] = losses

    def judge(self, trial: int, weight: float, figures: Figures) -> Verdict:
        """Notes an epoch of a trial and tells whether it goes on."""
        epoch = int(figures["epoch"])
        losses = losses_of(figures, self._objective)
        if losses is None:
            why = not_a_number(figures)
            verdict = Verdict(trial, figures, goes_on=False, broken=True, reason=why)
        else:
            others = {k: v for k, v in self._rungs.get(epoch, {}).items() if k != trial}
            self._rungs.setdefault(epoch, {})[trial] = losses
            halving, verdict = self._halving, Verdict(trial, figures)
            if (
                halving is not None
                and epoch in halving.rungs
                and not halving.goes_on(losses, list(others.values()), weight)
            ):
                best = f"the best 1/{halving.factor} of {len(others) + 1} trials"
                why = f"after epoch {epoch} not among {best}"
                verdict = Verdict(trial, figures, goes_on=False, reason=why)
        self._news.append(verdict)
        return verdict

    def drain(self) -> list[Verdict]:
        """What came since the last call."""
        news, self._news = self._news, []
        return news


@dataclass(frozen=True)
class EpochListener:
    """Called in the Train controller with each epoch of a trial's stage 2, in order.

    Raises TrainingStopped where the referee says so, ArithmeticError for an epoch without a point.
    A referee that is gone stops nobody.
    """

    referee: str
    trial: int
    weight: float

    def __call__(self, figures: Mapping[str, Any]) -> None:
        import ray

        own = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        try:
            referee = ray.get_actor(self.referee)
            verdict: Verdict = ray.get(
                referee.judge.remote(self.trial, self.weight, own), timeout=TIMEOUT_S
            )
        except (ValueError, ray.exceptions.RayError) as error:
            logger.warning("trial %d is not judged: %s", self.trial, error)
            return
        if verdict.broken:
            raise ArithmeticError(verdict.reason)
        if not verdict.goes_on:
            raise TrainingStopped(verdict.reason)


def not_a_number(figures: Figures) -> str:
    """Why an epoch has no rate-accuracy point."""
    epoch = int(figures.get("epoch", 0))
    return f"holdout/bits or holdout/top1 of epoch {epoch} is not a finite number"
