"""The records of a stage: its kind, its plan, the inputs and the outcome of its run.

Imports no library: the command line reads the stages for its help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.manifest import TaskTable
    from mantis_core.config import TrainingConfig
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.evaluation.arms import Arm
    from pipelines.settings.sections import Settings
    from pipelines.storage import Store
    from pipelines.terminal.console import Console
    from pipelines.tracking.runs import Tracker
    from pipelines.training.weights import Weights

READER = tuple(
    f"data.{name}"
    for name in ("augmentation", "crop_padding", "min_crop_area", "flip", "shuffle_window_rows")
)
"""Fields of `data` that shape batches in training. A prepared folder does not depend on them."""
CACHE = ("data.cache", "data.cache_gib")
"""Fields of `data` that decide no result: what a machine keeps of its images."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a plan beside the config: resolved tasks, a hash of the data, the arms."""

    table: TaskTable
    data_fingerprint: str
    arms: tuple[Arm, ...]


def once(settings: Settings, inputs: Inputs) -> Iterable[tuple[str, Settings]]:
    """Yields the stage once, for the main arm."""
    yield "", settings


@dataclass(frozen=True)
class Stage:
    """One kind of stage. Its file defines it and `order.STAGES` lists it.

    `planned` yields (arm, its settings) for each arm that has such a stage; "" is the main arm.
    `after` names the stages it builds on: `stage2` for the main arm alone, `stage2/*` for all arms.
    `reads` are the dotted config fields that decide its result. `leaves_out` are fields below them
    that do not. `identities` returns digests of data and files that the config only names. `code`
    are modules whose syntax trees enter its key, together with those of their imports. A training
    has a `recipe`, and `section` is the dotted field of its epochs and optimiser. A stage with
    `help` is a command of `mantis`.

    The functions import what they need when they are called, so a driver that only plans loads no
    torch. They are module-level functions because workers unpickle them by name.
    """

    name: str
    after: tuple[str, ...]
    reads: tuple[str, ...]
    code: tuple[str, ...]
    run: Callable[[StageSpec, StageContext], dict[str, Any]]
    planned: Callable[[Settings, Inputs], Iterable[tuple[str, Settings]]] = once
    leaves_out: tuple[str, ...] = ()
    identities: Callable[[Settings, Inputs], dict[str, Any]] | None = None
    section: str = ""
    recipe: Callable[[Settings, Problem, Weights], Recipe] | None = None
    help: str = ""

    @property
    def trains(self) -> bool:
        """Returns whether the stage is a training, with epochs and checkpoints."""
        return self.recipe is not None


@dataclass(frozen=True)
class StageSpec:
    """One planned stage.

    `name` is the kind, or `kind/arm`. `config` is the part of the config that decides its result.
    `key` identifies the result; `recipe` is the same without code and package versions. `settings`
    is the whole config with the arm's overrides applied. `code_key` identifies the packages and the
    code of the stage alone. `upstream` names the planned stages that
    it builds on. `folder` is a full address. `arms` are the arms that `evaluate` measures. If the
    stage has adopted the result of another run, `folder` and `key` are those of that result, and
    `adopted_for` is the stage's own folder.
    """

    stage: Stage
    name: str
    arm: str
    config: dict[str, Any]
    upstream: tuple[str, ...]
    key: str
    recipe: str
    folder: str
    settings: Settings
    arms: tuple[Arm, ...] = ()
    adopted_for: str = ""
    code_key: str = ""

    @property
    def kind(self) -> str:
        """The name of the stage without the arm."""
        return self.stage.name

    @property
    def training(self) -> TrainingConfig:
        """The section with the epochs and optimiser of the training. Only trainings have one."""
        section: TrainingConfig = attrgetter(self.stage.section)(self.settings)
        return section


@dataclass(frozen=True)
class StageContext:
    """The inputs of a runner beside its spec. `specs` are all stages of the plan by name."""

    settings: Settings
    store: Store
    tracker: Tracker
    console: Console
    specs: Mapping[str, StageSpec]
    manifest_folder: str
    table: TaskTable
    config_name: str
    run_id: str | None
    stage_run_id: str | None = None


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended. `status` is "ran", "resumed", "skipped" or "adopted"."""

    key: str
    status: str
    seconds: float
    rows: dict[str, Any] = field(default_factory=dict)


class TrainingStopped(RuntimeError):
    """Raised if a training was stopped on purpose. The next run continues it."""


class StageFailed(RuntimeError):
    """Raised if a stage failed. `cause` is the original error, unwrapped from those of Ray."""

    def __init__(self, stage: str, cause: BaseException) -> None:
        super().__init__(f"{stage} failed: {type(cause).__name__}: {cause}")
        self.stage = stage
        self.cause = cause

    def __reduce__(self) -> tuple[type[StageFailed], tuple[str, BaseException]]:
        return StageFailed, (self.stage, self.cause)


def with_upstream(specs: Sequence[StageSpec], name: str) -> tuple[StageSpec, ...]:
    """Returns a stage and all stages it builds on, in order."""
    wanted = {name}
    for spec in reversed(specs):
        if spec.name in wanted:
            wanted.update(spec.upstream)
    return tuple(spec for spec in specs if spec.name in wanted)


def upstream_folders(spec: StageSpec, specs: Mapping[str, StageSpec]) -> dict[str, str]:
    """Returns the folders of the stages that a stage builds on, by kind."""
    return {specs[name].kind: specs[name].folder for name in spec.upstream}
