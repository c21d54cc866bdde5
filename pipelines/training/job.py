"""The job that a driver sends to the workers of a training. Imports no network."""

from __future__ import annotations

import hashlib
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

    @property
    def seed(self) -> int:
        """The seed of all that the training draws after its initial weights."""
        return stage_seed(self.settings.seed, self.kind)


def stage_seed(seed: int, kind: str) -> int:
    """Returns a 63-bit seed for one kind of stage.

    With one seed for all, a student would see the images cropped and in the order in which its
    teacher has learned them. All arms of a kind share it, so they differ by their settings alone.
    """
    digest = hashlib.sha256(f"{seed}/{kind}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)
