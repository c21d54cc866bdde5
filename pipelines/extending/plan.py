"""Plans the addition of tasks to a trained codec. Runs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mantis_core.codec.checkpoint import read_spec
from mantis_core.codec.spec import AddedTask, ModelSpec
from mantis_core.config import ExtendConfig
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder
from mantis_core.rates import levels_of
from mantis_core.tasks import TaskSpec
from pipelines.chain.plan import Plan, plan_stages, read_data
from pipelines.evaluation.arms import Arm
from pipelines.extending.stages import EXTENSION
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings

KIND = "extend"


def extension_plan(base: Path, config: Path, overrides: Sequence[str]) -> Plan:
    """The stages that add the tasks of a config to the codec in folder `base`.

    Images are taken at the size of that codec, whatever the config says. Raises ModelError if the
    folder holds no whole codec or a task does not fit it; DataError and SettingsError as
    `make_plan`.
    """
    spec = base_spec(base)
    height, width = spec.image_size
    own = (
        f"extend.model={base.resolve()}",
        f"data.image_size=[{height}, {width}]",
        f"data.short_side={spec.short_side}",
    )
    settings = load_settings(config, [*overrides, *own])
    table, fingerprint = read_data(settings)
    known = [task.name for task in spec.every_task]
    if taken := [task.name for task in table.tasks if task.name in known]:
        raise ModelError(
            f"the codec in {base} has {', '.join(taken)} already: give the task another name"
        )
    check_added(spec, [task.name for task in table.tasks], settings.extend)
    arms = tuple(_arms(settings, spec))
    specs = plan_stages(settings, table, fingerprint, stages=EXTENSION, arms=arms)
    return Plan(settings, table, specs)


def base_spec(folder: Path) -> ModelSpec:
    """The spec of a whole codec, without its weights; ModelError for a half or no codec."""
    _, config, meta = load_folder(folder, wanted=())
    if "half" in meta:
        raise ModelError(
            f"{folder} holds the {meta['half']} alone; tasks are added to the whole codec"
        )
    try:
        return read_spec(config)
    except ValueError as error:
        raise ModelError(f"{folder} holds no codec: {error}") from None


def check_added(spec: ModelSpec, names: Sequence[str], config: ExtendConfig) -> None:
    """ModelError for tasks that a codec cannot take in this grade, and for a rank too high."""
    from mantis_core.codec.adding import check_extension, spec_with
    from mantis_core.codec.halves import new_client
    from mantis_core.networks.extension import rank_within

    tasks = [TaskSpec(name, "classification", 1) for name in names]
    if config.rank is not None and config.grade != "adapter":
        raise ModelError(
            f"extend.rank is for the grade adapter, and extend.grade is {config.grade}: leave one "
            "of them out"
        )
    if config.grade == "server":
        spec_with(spec, added=[AddedTask(task=task, through=config.through) for task in tasks])
        return
    if config.compile == "on":
        raise ModelError(
            f"extend.compile is for the grade server: {config.grade} is trained without "
            "torch.compile; leave it out"
        )
    rank = 0
    if config.grade == "adapter":
        rank = rank_within(new_client(spec), spec.model.conditioning.kind, config.rank)
    check_extension(spec, tasks, rank=rank, through=config.through)


def _arms(settings: Settings, spec: ModelSpec) -> list[Arm]:
    """The new tasks at each rate that the codec was trained for."""
    rates = spec.rates or (None,)
    levels: Sequence[int | None] = levels_of(spec.rates) or (None,)
    return [
        Arm(
            KIND if not level else f"mantis/level-{level}",
            "mantis",
            rate,
            settings.seed,
            KIND,
            level=level,
        )
        for rate, level in zip(rates, levels, strict=True)
    ]
