"""The driver's side of a search: which trial is next, what became of it, written down each time.

Knows the journal, MLflow's runs and the view; not Ray Tune, which only calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.cluster import PreflightError
from pipelines.plan import with_upstream
from pipelines.search_journal import Journal, TrialRecord, finished_points
from pipelines.search_points import RdPoint, hypervolume, pareto_front
from pipelines.search_referee import Verdict
from pipelines.search_sampler import SearchKind, propose, random_weight
from pipelines.search_trial import SearchTask, TrialOutcome, first_line
from pipelines.search_view import SearchView
from pipelines.settings import Settings
from pipelines.settings_errors import SettingsError
from tune_spaces.domains import Field

if TYPE_CHECKING:
    from pipelines.search_runs import SearchRuns

ATTEMPTS = 20  # at a sample that no trial has had, before one counts as equal to another


@dataclass(frozen=True)
class SearchOptions:
    """What the command line says of a search."""

    space: str
    trials: int
    kind: SearchKind = "optuna"
    objective: str = "pareto"
    include_stage1: bool = False
    resume: bool = False
    register: bool = False
    seed: int = 0


@dataclass
class Timing:
    """Unix seconds: when trials of this session ran, their processes' starts included."""

    intervals: list[tuple[float, float]] = field(default_factory=list)
    processes: set[float] = field(default_factory=set)

    def add(self, outcome: TrialOutcome) -> None:
        """A trial that is over; the start of its process counts for the first trial in it."""
        first = outcome.process not in self.processes
        self.processes.add(outcome.process)
        self.intervals.append((outcome.process if first else outcome.began, outcome.finished))

    def idle(self, began: float, ended: float) -> float:
        """Seconds between two times in which no trial ran and no process of one was starting."""
        idle, reached = 0.0, began
        for start, end in sorted(self.intervals):
            idle += max(0.0, min(start, ended) - reached)
            reached = max(reached, end)
        return idle + max(0.0, ended - reached)


class SearchDriver:
    """Asks, judges nothing, writes everything down: first the journal, then MLflow, then the view.

    `check` raises PreflightError for settings whose training the cluster cannot hold.
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
        reference: RdPoint,
        check: Callable[[Settings], None],
    ) -> None:
        self.options, self.space, self.task = options, space, task
        self.journal, self.runs, self.view = journal, runs, view
        self.reference, self.check = reference, check
        self.timing = Timing()
        self.unfinished = [r.number for r in journal.trials.values() if r.state == "running"]

    def next_trial(self) -> dict[str, Any] | None:
        """What the next trial is run with, one that a killed search left behind first; None when
        as many as were asked for have been begun."""
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
        """An epoch of a running trial; after a resume those known already come again."""
        record = self.journal.trials[verdict.trial]
        if record.state == "running" and int(verdict.figures["epoch"]) not in record.epochs:
            self.journal.epoch(verdict.trial, verdict.figures)
            self.view.epoch(self.journal.trials[verdict.trial])

    def over(self, number: int, outcome: TrialOutcome | None) -> None:
        """A trial's end; without an outcome its process was lost more often than is mended."""
        if outcome is None:
            lost = self.task.settings.tune.max_failures + 1
            reason = f"the trial's process was lost {lost} times (tune.max_failures)"
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
        """A sample no trial has had, if one is found; its run and its stages' keys."""
        options, records = self.options, self.journal.trials.values()
        for attempt in range(ATTEMPTS):
            params = propose(
                self.space,
                records,
                number,
                kind=options.kind,
                objective=options.objective,
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
        """Stage to key; empty for a sample the config refuses."""
        try:
            plan = self.task.plan(params)
        except SettingsError:
            return {}
        return {spec.name: spec.key for spec in with_upstream(plan.specs, "stage2")}

    def _refused(self, record: TrialRecord) -> str:
        """Why a sample cannot be trained at all; empty if it can."""
        try:
            self.check(self.task.plan(record.params).settings)
        except (SettingsError, PreflightError) as error:
            return first_line(str(error))
        return ""

    def _twin(self, record: TrialRecord) -> TrialRecord | None:
        """An earlier trial of the very same stage 2."""
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
        self.runs.progress(len(ended), summary(ended, self.reference))
        self.view.ended(record)


def summary(ended: list[TrialRecord], reference: RdPoint) -> dict[str, float]:
    """The figures of a search after some trials."""
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
