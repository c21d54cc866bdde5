"""The weights that a training builds on: those of finished stages, or given ones of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mantis_core.folders import load_folder
from mantis_core.training.teacher import ready_teacher
from pipelines.settings.sections import Settings
from pipelines.storage import local_copy
from pipelines.training.files import CHECKPOINT

if TYPE_CHECKING:
    from torch import Tensor

    from mantis_core.networks.teacher import Teacher
    from mantis_core.tasks import Problem


class Weights(Protocol):
    """Where a recipe takes the weights that it starts from."""

    def teacher(self, settings: Settings, problem: Problem) -> Teacher:
        """Returns the frozen teacher."""
        ...

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Returns what the stage of this kind, one that the training builds on, has trained."""
        ...


@dataclass(frozen=True)
class SavedWeights:
    """The weights in the folders of finished stages, by kind."""

    folders: Mapping[str, str]

    def teacher(self, settings: Settings, problem: Problem) -> Teacher:
        """Returns the teacher of its own stage, or one with given weights."""
        return load_teacher(settings, problem, self.folders.get("teacher"))

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Returns the weights of a finished stage."""
        return stage_tensors(self.folders[kind])


def load_teacher(settings: Settings, problem: Problem, folder: str | None) -> Teacher:
    """Returns the frozen teacher. `folder` is that of its stage, None for given weights."""
    trained = None if folder is None else stage_tensors(folder)
    return ready_teacher(settings.teacher, problem, trained)


def stage_tensors(folder: str) -> dict[str, Tensor]:
    """Returns the weights in the folder (path or URI) of a finished training stage."""
    with local_copy(f"{folder}/{CHECKPOINT}") as local:
        return load_folder(local)[0]
