"""One trial, as it runs below Ray Tune: the stage chain of a config with a sample applied.

The processes that run it ask for next to no CPU: the training below them is a Ray Train run of its
own, which is what takes resources.
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

from pipelines.plan import StageSpec, plan_stages, with_upstream
from pipelines.run_record import StageBusy, read_result, stage_state
from pipelines.search_points import rd_point
from pipelines.search_space import Params, overrides_of
from pipelines.settings import EvaluateConfig, Settings, with_overrides
from pipelines.stages import Plan, StageFailed, TrainingStopped, make_tracker, run_stages
from pipelines.storage import Store
from pipelines.trainer import HISTORY

if TYPE_CHECKING:
    from data_prep.schema import TaskTable

logger = logging.getLogger(__name__)

OUTCOME = "outcome"
"""The one figure Tune is told of a trial: a TrialOutcome as JSON text."""
WAIT_S = 2.0  # between two looks at a stage another trial trains
Result = TypeVar("Result")


@dataclass(frozen=True)
class SearchTask:
    """What all trials of a search share, as plain values that travel to their processes."""

    settings: Settings
    table: TaskTable
    data_fingerprint: str
    config_name: str

    def plan(self, params: Params) -> Plan:
        """The stages of a sample: the main arm alone. Raises SettingsError."""
        settings = with_overrides(self.settings, overrides_of(params))
        specs = plan_stages(settings, self.table, self.data_fingerprint)
        return Plan(settings, self.table, specs)


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended. `began` and `finished` are the trial's own, `process` that of its process.

    `epochs` are all of stage 2, `figures` those of the weights it left; times are in Unix seconds.
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
    """The config of a search: its main arm alone, no baselines, no codecs."""
    alone = EvaluateConfig(baselines=(), batch_size=settings.evaluate.batch_size)
    return settings.model_copy(update={"evaluate": alone})


def run_trial(config: Mapping[str, Any], task: SearchTask, concurrent: int) -> dict[str, str]:
    """What Tune calls in a trial's process: runs `train_trial` in a process beside it.

    Whatever a Tune trial starts, and what that starts, is placed into the trial's own placement
    group, where the small tasks of Ray Data never find a CPU. A task with a strategy of its own is
    not. Raises what Ray raises if the process is lost: then Tune tries again.
    """
    import ray

    beside = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")(train_trial)
    outcome: TrialOutcome = ray.get(beside.remote(dict(config), task, concurrent))
    return {OUTCOME: outcome.to_json()}


def train_trial(config: Mapping[str, Any], task: SearchTask, concurrent: int) -> TrialOutcome:
    """Trains a sample. A failure of the trial is an outcome, not an error."""
    began = time.time()
    epochs: list[dict[str, float]] = []
    figures: dict[str, float] = {}
    try:
        plan = task.plan(config["params"])
        figures, epochs = _train(plan, config, task.config_name, concurrent=concurrent)
        point = rd_point(figures)
        state, reason = ("finished", "") if point else ("failed", _no_point(epochs))
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
    """As much of an error as a table and an MLflow tag hold."""
    return (text.strip().splitlines() or ["unknown"])[0][:250]


def process_started() -> float:
    """When this process was started, in Unix seconds."""
    import psutil

    return psutil.Process(os.getpid()).create_time()


def _train(
    plan: Plan, config: Mapping[str, Any], config_name: str, *, concurrent: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Runs what the sample lacks up to stage 2; its best figures and those of every epoch."""
    from pipelines.console import Console
    from pipelines.search_referee import EpochListener
    from pipelines.stage_callback import listening

    store = Store(plan.settings.storage.root)
    console = Console(sys.stderr, live=False)  # Ray's log
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
    """Lets one trial of the search pass with one stage key, wherever on the cluster it runs.

    The sign at the door is a named actor of this process: it goes when the process does.
    """
    import ray

    while True:
        try:
            sign = ray.remote(num_cpus=0)(_Sign).options(name=f"mantis-stage-{key[:12]}").remote()
            break
        except ValueError:  # the name is taken
            time.sleep(WAIT_S)
    try:
        yield
    finally:
        ray.kill(sign)


def patiently(run: Callable[[], Result]) -> Result:
    """Runs a stage, waiting while another process works on it: another command, or the remains of
    one that was killed."""
    while True:
        try:
            return run()
        except StageBusy as busy:
            logger.info("%s", busy)
            time.sleep(WAIT_S)


class _Sign:
    """An actor that only has a name."""


def _no_point(epochs: list[dict[str, float]]) -> str:
    from pipelines.search_referee import not_a_number

    return not_a_number(epochs[-1] if epochs else {})
