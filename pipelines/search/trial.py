"""Runs one trial of Ray Tune: the stage chain of a config with a sample applied.

The processes of a trial reserve no CPU. The training they start is a Ray Train run, which reserves
its own resources.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pipelines.chain.plan import Plan, plan_stages, with_adopted
from pipelines.chain.run import make_tracker, run_stages
from pipelines.search.points import rd_points
from pipelines.search.space import Params, overrides_of
from pipelines.settings.reading import with_overrides
from pipelines.settings.sections import EvaluateConfig, Settings
from pipelines.stages.record import StageBusy, read_result, stage_state
from pipelines.stages.spec import StageFailed, StageSpec, TrainingStopped, with_upstream
from pipelines.storage import Store
from pipelines.training.files import HISTORY

if TYPE_CHECKING:
    from data_prep.manifest import TaskTable

logger = logging.getLogger(__name__)
OUTCOME = "outcome"
"""The only result reported to Tune: a TrialOutcome as JSON text."""

WAIT_S = 2.0  # between two attempts at a stage that another process runs
Result = TypeVar("Result")


@dataclass(frozen=True)
class SearchTask:
    """Holds what all trials of a search share. Ray copies it to their processes."""

    settings: Settings
    table: TaskTable
    data_fingerprint: str
    config_name: str

    def plan(self, params: Params) -> Plan:
        """Plans the stages of a sample, main arm only.

        Raises SettingsError if the config refuses the sample.
        """
        settings = with_overrides(self.settings, overrides_of(params))
        specs = plan_stages(settings, self.table, self.data_fingerprint)
        return Plan(settings, self.table, with_adopted(specs, settings, search=False))


@dataclass(frozen=True)
class TrialOutcome:
    """Records how a trial ended.

    `epochs` holds the figures of each epoch of stage 2, `figures` those of the final weights.
    `began` and `finished` are the times of the trial, `process` the start of its process, all in
    Unix seconds.
    """

    state: str
    reason: str
    epochs: tuple[Mapping[str, float], ...]
    figures: Mapping[str, float]
    process: float
    began: float
    finished: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> TrialOutcome:
        return cls(**json.loads(text))


def search_settings(settings: Settings) -> Settings:
    """Returns the config of a search: the main arm, without baselines and image codecs."""
    alone = EvaluateConfig(baselines=(), batch_size=settings.evaluate.batch_size)
    return settings.model_copy(update={"evaluate": alone})


def run_trial(config: Mapping[str, Any], task: SearchTask, concurrent: int) -> dict[str, str]:
    """Runs `train_trial` in a second process. Tune calls this in the trial's own process.

    Ray places all that a Tune trial starts into the trial's placement group, where the small tasks
    of Ray Data never find a CPU. A task with its own scheduling strategy escapes this. Raises Ray's
    error if the second process dies; Tune then restarts the trial.
    """
    import ray

    beside = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")(train_trial)
    outcome: TrialOutcome = ray.get(beside.remote(dict(config), task, concurrent))
    return {OUTCOME: outcome.to_json()}


def train_trial(config: Mapping[str, Any], task: SearchTask, concurrent: int) -> TrialOutcome:
    """Trains a sample. Returns a failure as an outcome and does not raise it."""
    began = time.time()
    epochs: list[dict[str, float]] = []
    figures: dict[str, float] = {}
    try:
        plan = task.plan(config["params"])
        figures, epochs = _train(plan, config, task.config_name, concurrent=concurrent)
        state, reason = ("finished", "") if rd_points(figures) else ("failed", _no_point(epochs))
    except TrainingStopped as stop:
        state, reason = "stopped", str(stop)
    except StageFailed as error:
        state, reason = "failed", first_line(str(error))
    except Exception as error:
        logger.exception("trial %s failed", config["number"])
        state, reason = "failed", first_line(f"{type(error).__name__}: {error}")
    return TrialOutcome(
        state, reason, tuple(epochs), figures, process_started(), began, time.time()
    )


def first_line(text: str) -> str:
    """Shortens an error to one line of at most 250 characters, for a table and an MLflow tag."""
    return (text.strip().splitlines() or ["unknown"])[0][:250]


def process_started() -> float:
    """Returns the start time of this process in Unix seconds."""
    import psutil

    return float(psutil.Process(os.getpid()).create_time())


def _train(
    plan: Plan, config: Mapping[str, Any], config_name: str, *, concurrent: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Runs the missing stages up to stage 2; returns its final figures and those of each epoch."""
    from pipelines.search.referee import EpochListener
    from pipelines.terminal.console import Console
    from pipelines.training.callback import listening

    store = Store(plan.settings.storage.root)
    console = Console(sys.stderr, live=False)  # Ray writes it to its log
    tracker = make_tracker(plan.settings, console)

    def run(*specs: StageSpec) -> None:
        run_stages(
            plan,
            specs,
            store=store,
            tracker=tracker,
            console=console,
            config_name=config_name,
            run_id=config["run_id"],
        )

    *upstream, main = with_upstream(plan.specs, "stage2")
    for spec in upstream:
        done = stage_state(store, spec, plan.settings.tracking.uri) == "done"
        with nullcontext() if done or concurrent == 1 else one_at_a_time(spec.key):
            patiently(partial(run, spec))
    with listening(EpochListener(config["referee"], config["number"], config["weight"])):
        patiently(partial(run, main))
    history = store.read_json(f"{main.folder}/{HISTORY}.json")
    return read_result(store, main)["metrics"], history


@contextmanager
def one_at_a_time(key: str) -> Iterator[None]:
    """Holds a cluster-wide lock on a stage key, so that only one trial runs the stage.

    The lock is a named actor owned by this process; Ray removes it when the process ends.
    """
    import ray

    while True:
        try:
            lock = ray.remote(num_cpus=0)(_Lock).options(name=f"mantis-stage-{key[:12]}").remote()
            break
        except ValueError:  # the name is taken
            time.sleep(WAIT_S)
    try:
        yield
    finally:
        ray.kill(lock)


def patiently(run: Callable[[], Result]) -> Result:
    """Runs a stage, and waits while another process runs it.

    That process may belong to another command, or to one that was killed.
    """
    while True:
        try:
            return run()
        except StageBusy as busy:
            logger.info("%s", busy)
            time.sleep(WAIT_S)


class _Lock:
    """An actor without methods. Its name is the lock."""


def _no_point(epochs: list[dict[str, float]]) -> str:
    from pipelines.search.referee import not_a_number

    return not_a_number(epochs[-1] if epochs else {})
