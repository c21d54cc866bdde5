"""The stages that add tasks to a trained codec: prepare, extend, evaluate, register."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipelines.stages import train
from pipelines.stages.evaluate import EVALUATE
from pipelines.stages.prepare import PREPARE
from pipelines.stages.register import REGISTER
from pipelines.stages.spec import READER, Inputs, Stage, StageContext, StageSpec
from pipelines.training.files import CHECKPOINT

if TYPE_CHECKING:
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.settings.sections import Settings
    from pipelines.training.weights import Weights


def identities(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """Returns what the codec that is extended adds to the key: its weights, not where they lie."""
    from mantis_core.folders import read_meta

    meta = read_meta(settings.extend.model)
    return {"base": {name: meta[name] for name in ("model_id", "weights_sha256")}}


def recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds the codec with the added tasks, of which these alone are trained."""
    from mantis_core.codec.checkpoint import load_model
    from mantis_core.training.extend import extend_recipe

    base = load_model(settings.extend.model)
    return extend_recipe(settings.extend, base, problem, seed=settings.seed)


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """Trains the added tasks. Raises ModelError if the codec answers an old task otherwise."""
    from mantis_core.codec.adding import check_same_codec
    from mantis_core.codec.checkpoint import load_model
    from pipelines.storage import local_copy

    result = train.run(spec, context)
    with local_copy(f"{spec.folder}/{CHECKPOINT}") as folder:
        check_same_codec(load_model(spec.settings.extend.model), load_model(folder))
    return result


EXTEND = Stage(
    name="extend",
    after=("prepare",),
    reads=("seed", *READER, "extend"),
    leaves_out=("extend.model",),
    identities=identities,
    code=("pipelines.extending.stages", "pipelines.training.worker"),
    section="extend",
    recipe=recipe,
    run=run,
)

EXTENSION: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        PREPARE,
        EXTEND,
        replace(EVALUATE, after=("prepare", "extend")),
        replace(REGISTER, after=("extend", "evaluate")),
    )
}
"""The stages, in the order they run."""
