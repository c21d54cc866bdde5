"""The job that a driver sends to the workers of a training. Imports no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mantis_core.config import TrainingConfig
    from mantis_core.tasks import Problem
    from mantis_core.training.recipe import Recipe
    from pipelines.settings.sections import Settings
    from pipelines.training.weights import Weights


@dataclass(frozen=True)
class Training:
    """One training, as its driver sends it to its workers.

    `section` and `recipe` are those of the stage. `prepared` is the folder of the shards, `folder`
    that of the model, `checkpoints` that of resumable states. `upstream` are the folders of
    finished stages by kind. `preparation` records in the model's metadata how images became rows.
    """

    name: str
    kind: str
    key: str
    settings: Settings
    section: TrainingConfig
    recipe: Callable[[Settings, Problem, Weights], Recipe]
    prepared: str
    folder: str
    checkpoints: str
    upstream: Mapping[str, str]
    preparation: Mapping[str, Any] = field(default_factory=dict)
