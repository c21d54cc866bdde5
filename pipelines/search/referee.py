"""Stops weak trials: a Ray actor that judges epochs, and the listener that reports them to it.

The actor keeps the losses of all trials at each rung, and `Halving` decides. The driver fetches
the verdicts and writes the journal.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.search.journal import TrialRecord
from pipelines.search.points import Figures, Halving, Losses, SearchObjective
from pipelines.stages.spec import TrainingStopped

logger = logging.getLogger(__name__)
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Verdict:
    """Says whether a trial continues after an epoch.

    A trial that does not is stopped, or `broken` if the epoch has no rate-accuracy point.
    """

    trial: int
    figures: Figures
    goes_on: bool = True
    broken: bool = False
    reason: str = ""


class Referee:
    """Keeps the losses of each trial at each epoch and judges new epochs by them."""

    def __init__(self, halving: Halving | None, objective: SearchObjective) -> None:
        self._halving, self._objective = halving, objective
        self._rungs: dict[int, dict[int, Losses]] = {}
        self._news: list[Verdict] = []

    def recall(self, records: Iterable[TrialRecord]) -> None:
        """Loads the epochs in the journal, so a resumed search judges against all trials."""
        for record in records:
            for epoch, figures in record.epochs.items():
                losses = self._objective.losses(figures)
                if losses is not None:
                    self._rungs.setdefault(epoch, {})[record.number] = losses

    def judge(self, trial: int, weight: float, figures: Figures) -> Verdict:
        """Records an epoch of a trial and decides whether the trial continues."""
        epoch = int(figures["epoch"])
        losses = self._objective.losses(figures)
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
                why = f"not among {best} after epoch {epoch}"
                verdict = Verdict(trial, figures, goes_on=False, reason=why)
        self._news.append(verdict)
        return verdict

    def drain(self) -> list[Verdict]:
        """Returns the verdicts since the last call."""
        news, self._news = self._news, []
        return news


@dataclass(frozen=True)
class EpochListener:
    """Asks the referee about each epoch of a trial's stage 2; runs in the Train controller.

    Raises TrainingStopped if the trial is stopped, ArithmeticError if the epoch has no point. A
    trial continues if the referee cannot be reached.
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
            logger.warning("trial %d was not judged and continues: %s", self.trial, error)
            return
        if verdict.broken:
            raise ArithmeticError(verdict.reason)
        if not verdict.goes_on:
            raise TrainingStopped(verdict.reason)


def not_a_number(figures: Figures) -> str:
    """Says why an epoch has no rate-accuracy point."""
    epoch = int(figures.get("epoch", 0))
    return f"holdout/bits or holdout/top1 of epoch {epoch} is not a finite number"
