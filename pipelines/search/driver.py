"""Picks the next trial of a search and records how each trial went, in the driver process.

Knows the journal, MLflow's runs and the view. Does not know Ray Tune, which calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.chain.plan import Plan
from pipelines.search.journal import Journal, TrialRecord, finished_points
from pipelines.search.points import RdPoint, SearchObjective, hypervolume, pareto_front
from pipelines.search.referee import Verdict
from pipelines.search.result import SearchOptions
from pipelines.search.sampler import propose, random_weight
from pipelines.search.trial import SearchTask, TrialOutcome, first_line
from pipelines.search.view import SearchView
from pipelines.settings.errors import SettingsError
from pipelines.stages.spec import with_upstream
from pipelines.training.causes import is_mistake
from tune_spaces.domains import Field

if TYPE_CHECKING:
    from pipelines.search.runs import SearchRuns

ATTEMPTS = 20  # draws of a sample before a duplicate of an earlier trial is accepted


@dataclass
class Timing:
    """Records when trials of this session ran, in Unix seconds.

    An interval includes the start of the trial's process.
    """

    intervals: list[tuple[float, float]] = field(default_factory=list)
    processes: set[float] = field(default_factory=set)

    def add(self, outcome: TrialOutcome) -> None:
        """Adds a trial that ended. The start of a process counts for its first trial only."""
        first = outcome.process not in self.processes
        self.processes.add(outcome.process)
        self.intervals.append((outcome.process if first else outcome.began, outcome.finished))

    def idle(self, began: float, ended: float) -> float:
        """Returns the seconds between `began` and `ended` without a running or starting trial."""
        idle, reached = 0.0, began
        for start, end in sorted(self.intervals):
            idle += max(0.0, min(start, ended) - reached)
            reached = max(reached, end)
        return idle + max(0.0, ended - reached)


class SearchDriver:
    """Asks the sampler for trials and records their results; the referee judges them.

    Writes to the journal first, then to MLflow, then to the view, so a killed driver loses nothing.
    `check` raises the error of a sample that cannot be trained, such as one too large for the
    cluster.
    """

    def __init__(
        self,
        options: SearchOptions,
        space: Mapping[str, Field],
        task: SearchTask,
        journal: Journal,
        runs: SearchRuns,
        view: SearchView,
        *,
        objective: SearchObjective,
        check: Callable[[Plan], None],
    ) -> None:
        self.options, self.space, self.task = options, space, task
        self.journal, self.runs, self.view = journal, runs, view
        self.objective, self.check = objective, check
        self.timing = Timing()
        self.unfinished = [r.number for r in journal.trials.values() if r.state == "running"]

    def next_trial(self) -> dict[str, Any] | None:
        """Returns the config of the next trial for Ray Tune, or None if all trials have begun.

        Trials that a killed search left unfinished come first.
        """
        trials = self.journal.trials
        if self.unfinished:
            return self._begin(trials[self.unfinished.pop(0)])
        while len(trials) < self.options.trials:
            record = self._propose(len(trials))
            self.journal.asked(record)
            if reason := self._refused(record):
                self._close(record.number, "failed", reason)
            elif (twin := self._twin(record)) is not None:
                self._close(record.number, "equal", f"equal to trial {twin.number}")
            else:
                return self._begin(self.journal.trials[record.number])
        return None

    def judged(self, verdict: Verdict) -> None:
        """Records an epoch of a running trial. A resumed trial repeats epochs; they are skipped."""
        record = self.journal.trials[verdict.trial]
        if record.state == "running" and int(verdict.figures["epoch"]) not in record.epochs:
            self.journal.epoch(verdict.trial, verdict.figures)
            self.view.epoch(self.journal.trials[verdict.trial])

    def over(self, number: int, outcome: TrialOutcome | None) -> None:
        """Records how a trial ended.

        `outcome` is None if its process died more than `tune.max_failures` times.
        """
        if outcome is None:
            lost = self.task.settings.tune.max_failures + 1
            reason = f"the trial's process died {lost} times (tune.max_failures)"
            self._close(number, "failed", reason)
            return
        self.timing.add(outcome)
        for figures in outcome.epochs:
            self.journal.epoch(number, figures)
        self._close(number, outcome.state, outcome.reason, outcome.figures)

    def _begin(self, record: TrialRecord) -> dict[str, Any]:
        self.view.began(record)
        return {
            "number": record.number,
            "params": dict(record.params),
            "weight": record.weight,
            "run_id": record.run_id,
        }

    def _propose(self, number: int) -> TrialRecord:
        """Draws a new sample, or a duplicate after ATTEMPTS draws, and opens its MLflow run."""
        options, records = self.options, self.journal.trials.values()
        for attempt in range(ATTEMPTS):
            params = propose(
                self.space,
                records,
                number,
                kind=options.kind,
                objective=self.objective,
                seed=options.seed,
                startup_trials=self.task.settings.tune.startup_trials,
                attempt=attempt,
            )
            weight = random_weight(options.seed, number)
            record = TrialRecord(number, params, weight, keys=self._keys(params))
            if self._twin(record) is None:
                break
        run_id = self.runs.open_trial(number, record.params, record.weight)
        return TrialRecord(number, record.params, weight, record.keys, run_id)

    def _keys(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Maps each stage to its key. Empty if the config refuses the sample."""
        try:
            plan = self.task.plan(params)
        except SettingsError:
            return {}
        return {spec.name: spec.key for spec in with_upstream(plan.specs, "stage2")}

    def _refused(self, record: TrialRecord) -> str:
        """Says why a sample cannot be trained. Empty if it can."""
        try:
            self.check(self.task.plan(record.params))
        except ValueError as error:
            if not is_mistake(error):
                raise
            return first_line(str(error))
        return ""

    def _twin(self, record: TrialRecord) -> TrialRecord | None:
        """Returns an earlier trial with the same stage 2 key, or None."""
        key = record.keys.get("stage2")
        earlier = (r for r in self.journal.trials.values() if r.number < record.number)
        same = (r for r in earlier if r.state != "equal" and r.keys.get("stage2") == key)
        return next(same, None) if key is not None else None

    def _close(
        self, number: int, state: Any, reason: str, figures: Mapping[str, float] | None = None
    ) -> None:
        self.journal.ended(number, state, reason, figures)
        record = self.journal.trials[number]
        self.runs.close_trial(record)
        ended = [r for r in self.journal.trials.values() if r.state != "running"]
        self.runs.progress(len(ended), summary(ended, self.objective.reference))
        self.view.ended(record)


def summary(ended: list[TrialRecord], reference: RdPoint) -> dict[str, float]:
    """Returns the metrics of a search after the trials in `ended`."""
    points = finished_points({record.number: record for record in ended})
    figures = {
        f"search/{state}": float(sum(record.state == state for record in ended))
        for state in ("finished", "stopped", "failed", "equal")
    }
    return {
        **figures,
        "search/front": float(len(pareto_front(points))),
        "search/hypervolume": hypervolume(list(points.values()), reference),
        "search/epochs": float(sum(len(record.epochs) for record in ended)),
    }
