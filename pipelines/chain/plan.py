"""Plans an experiment: its stages, their order and their keys. Runs nothing.

A stage's key is a hash over everything that decides its result: the part of the config it reads,
the keys of the stages it builds on, the data, package versions and the code it runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mantis_core.baselines.image_codecs import IMAGE_CODECS
from pipelines.chain.earlier import recipes_before
from pipelines.chain.keys import config_slice, digest, plan_key, slim_slice
from pipelines.chain.source_hash import source_hash
from pipelines.evaluation.arms import Arm, plan_arms
from pipelines.settings.arms import ANSWERING, ARM_KINDS, trained_kinds
from pipelines.settings.errors import SettingsError
from pipelines.settings.sections import Settings
from pipelines.stages.order import STAGES
from pipelines.stages.record import find_same_recipe, read_adopted, stage_state
from pipelines.stages.spec import Inputs, Stage, StageSpec
from pipelines.storage import Store
from pipelines.versions import deciding

if TYPE_CHECKING:
    from data_prep.manifest import TaskTable


@dataclass(frozen=True)
class Plan:
    """The stages of a config, and the resolved tasks of its data."""

    settings: Settings
    table: TaskTable
    specs: tuple[StageSpec, ...]

    @property
    def key(self) -> str:
        """The key of the pipeline."""
        return plan_key(self.specs)

    @property
    def by_name(self) -> dict[str, StageSpec]:
        """The stages by name."""
        return {spec.name: spec for spec in self.specs}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that the stage `evaluate` measures, the main arm first."""
        return next(spec.arms for spec in self.specs if spec.kind == "evaluate")


def make_plan(settings: Settings, *, adopt: bool = False) -> Plan:
    """Reads the tasks and a fingerprint of the data, then plans. Opens no image.

    Stages that an earlier run adopted stay adopted. With `adopt`, missing stages are replaced by
    finished ones of the same recipe made by other code or packages. Raises DataError or
    SettingsError.
    """
    table, fingerprint = read_data(settings)
    specs = plan_stages(settings, table, fingerprint)
    return Plan(settings, table, with_adopted(specs, settings, search=adopt))


def read_data(settings: Settings) -> tuple[TaskTable, str]:
    """Returns the tasks of the data and its fingerprint. Opens no image. Raises DataError."""
    from data_prep.errors import DataError
    from data_prep.finding import source_fingerprint
    from data_prep.tasks import resolve_tasks

    try:
        table = resolve_tasks(settings.tasks, settings.data)
        return table, source_fingerprint(settings.data, table)
    except OSError as error:
        raise DataError(f"the data at {settings.data.root} cannot be read: {error}") from error


def plan_stages(
    settings: Settings,
    table: TaskTable,
    data_fingerprint: str,
    *,
    stages: Mapping[str, Stage] = STAGES,
    arms: Sequence[Arm] | None = None,
) -> tuple[StageSpec, ...]:
    """Returns all stages of the config, each after those it builds on.

    `arms` are what `evaluate` measures; None is what the config says.

    Raises SettingsError if a file of teacher weights is missing or an arm does not fit the tasks.
    Raises CodecError if Pillow cannot write an image codec on this machine.
    """
    if arms is None:
        _check_arms(settings, table)
        arms = tuple(plan_arms(settings))
    inputs = Inputs(table, data_fingerprint, tuple(arms))
    kind_of = {arm.suffix: arm.kind for arm in inputs.arms if arm.trains == "stage2"}
    planned: dict[str, StageSpec] = {}
    versions = deciding()
    for stage in stages.values():
        for arm, own in stage.planned(settings, inputs):
            name = f"{stage.name}/{arm}" if arm else stage.name
            upstream = _upstream(stage, planned, kind_of.get(arm, ""))
            known = stage.identities(own, inputs) if stage.identities else {}
            made = {"kind": stage.name, "config": {**slim_slice(own, stage), **known}}
            code = {"versions": versions, "code": source_hash(*stage.code)}
            above = {"upstream": {each: planned[each].key for each in upstream}}
            key = digest({**made, **above, **code})
            recipe = digest({**made, "upstream": {s: planned[s].recipe for s in upstream}})
            planned[name] = StageSpec(
                stage=stage,
                name=name,
                arm=arm,
                config={**config_slice(own, stage), **known},
                upstream=upstream,
                key=key,
                recipe=recipe,
                folder=f"{settings.storage.root}/stages/{name}-{key[:12]}",
                settings=own,
                arms=inputs.arms if stage.name == "evaluate" else (),
                code_key=digest(code),
            )
    return tuple(planned.values())


def with_adopted(
    specs: Sequence[StageSpec], settings: Settings, *, search: bool
) -> tuple[StageSpec, ...]:
    """Returns the stages. An adopted stage gets the folder and key of the result it uses.

    The keys of stages that build on an adopted one do not change.
    """
    store, uri = Store(settings.storage.root), settings.tracking.uri
    before = recipes_before(specs) if search else {}
    found = []
    for spec in specs:
        other = read_adopted(store, spec)
        if other is None and search and stage_state(store, spec, uri) != "done":
            other = find_same_recipe(store, spec, {spec.recipe, before[spec.name]}, uri)
        found.append(spec if other is None else other)
    return tuple(found)


def _upstream(stage: Stage, planned: Mapping[str, StageSpec], arm_kind: str) -> tuple[str, ...]:
    """Returns the names of the planned stages that a stage builds on, in order.

    An arm of `arm_kind` builds on the stages of its kind where there are such, else on those of the
    main arm.
    """
    wanted: list[str] = []
    for name in stage.after:
        kind, _, every = name.partition("/")
        own = [spec.name for spec in planned.values() if spec.kind == kind]
        mine = f"{kind}/{arm_kind}"
        wanted += (
            own if every else [each for each in own if each == (mine if mine in own else kind)]
        )
    return tuple(name for name in planned if name in wanted)


def _check_arms(settings: Settings, table: TaskTable) -> None:
    """Raises SettingsError or CodecError for an arm that would fail after the training."""
    for name in settings.evaluate.baselines:
        whose = ARM_KINDS[name].measures
        if whose in trained_kinds() and whose not in ("mantis", *settings.evaluate.baselines):
            raise SettingsError(
                f"evaluate.baselines: `{name}` measures the codec of `{whose}`, which is not "
                f"listed. Add `{whose}`, or leave `{name}` out."
            )
    for name in settings.evaluate.baselines:
        if not set(ANSWERING) & set(ARM_KINDS[name].overrides):
            continue
        if settings.model.send_answer:
            raise SettingsError(
                f"evaluate.baselines: `{name}` is an arm whose client sends its answer, and with "
                "model.send_answer=true those of all arms do. Set it to false, or leave "
                f"`{name}` out."
            )
        if not settings.model.detector.classes:
            raise SettingsError(
                f"evaluate.baselines: `{name}` sends the class that the detector names, and this "
                "one names tasks. Set model.detector.classes=true (with the loss ClassDetection), "
                f"or leave `{name}` out."
            )
    masks = [task.name for task in table.tasks if task.kind == "segmentation"]
    for name in settings.evaluate.baselines:
        asked = settings.model.requests == "asked"
        single = ARM_KINDS[name].answers in (("student",) if asked else ("student", "local"))
        if masks and single:
            raise SettingsError(
                f"evaluate.baselines: `{name}` needs images of one class each, and task "
                f"'{masks[0]}' is a segmentation. Leave `{name}` out."
            )
    for codec in settings.evaluate.codecs:
        IMAGE_CODECS[codec].require()
