"""Stage `teacher`: trains the network that all codecs distil, if `teacher.weights` is `train`.

Also identifies a teacher with given weights in the keys of the other stages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.stages.spec import READER, Inputs, Stage
from pipelines.stages.train import run

if TYPE_CHECKING:
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.settings.sections import Settings
    from pipelines.training.weights import Weights


def is_trained(settings: Settings) -> bool:
    """Returns whether the config trains its teacher instead of loading weights."""
    return settings.teacher.weights == "train"


def planned(settings: Settings, inputs: Inputs) -> Iterator[tuple[str, Settings]]:
    """Yields the stage once, or not at all if the weights are given."""
    if is_trained(settings):
        yield "", settings


def identities(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """Returns what `teacher.start` stands for: the sha256 of its file, or a name. {} without it."""
    from mantis_core.config import SHIPPED

    start = settings.teacher.start
    if start is None:
        return {}
    if start in SHIPPED:
        return {"start": f"{start}:{settings.teacher.name}"}
    return {"start": file_identity("start", start)}


def given_weights(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """Returns the key's entries for a teacher with given weights: a name or sha256 of each file."""
    from mantis_core.config import SHIPPED, SORTED

    weights, classes = settings.teacher.weights, settings.teacher.classes
    if is_trained(settings):
        return {}
    if weights in SHIPPED:
        return {"teacher_weights": f"{weights}:{settings.teacher.name}"}
    found = {"teacher_weights": file_identity("weights", weights)}
    if classes is not None:
        own = SORTED if classes == SORTED else file_identity("classes", classes)
        found["teacher_classes"] = own
    return found


def file_identity(field: str, file: str) -> str:
    """Returns the sha256 of a file of `teacher.<field>`. SettingsError if it does not exist."""
    from pipelines.settings.errors import SettingsError

    path = Path(file)
    if not path.is_file():
        ways = "give an existing .safetensors or .pth file"
        if field == "start":
            ways += ", or `pretrained` to download torchvision's"
        if field == "weights":
            ways += ", `train` to train the teacher here, or `pretrained` to download it"
        if field == "classes":
            ways = "give an existing text file with the class of each logit on a line, or `sorted`"
        raise SettingsError(f"teacher.{field}: there is no file {file}; {ways}")
    with path.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"


def recipe(settings: Settings, problem: Problem, weights: Weights) -> Recipe:
    """Builds the teacher, from random weights or from the backbone in `teacher.start`."""
    from mantis_core.training.teacher import teacher_recipe

    return teacher_recipe(settings.teacher, problem, seed=settings.seed)


TEACHER = Stage(
    name="teacher",
    help="Train the teacher, the uncompressed network that is distilled.",
    planned=planned,
    after=("prepare",),
    reads=("seed", *READER, "teacher"),
    leaves_out=("teacher.start",),  # the content of the file counts, not its path
    identities=identities,
    code=("pipelines.stages.teacher", "pipelines.training.worker", "mantis_core.training.teacher"),
    section="teacher.training",
    recipe=recipe,
    run=run,
)
