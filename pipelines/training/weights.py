"""Loads the weights of finished training stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mantis_core.folders import load_folder
from mantis_core.training.teacher import ready_teacher
from pipelines.settings.sections import Settings
from pipelines.storage import local_copy
from pipelines.training.files import CHECKPOINT

if TYPE_CHECKING:
    from torch import Tensor

    from mantis_core.networks.teacher import Teacher
    from mantis_core.tasks import Problem


def load_teacher(settings: Settings, problem: Problem, folder: str | None) -> Teacher:
    """Returns the frozen teacher. `folder` is that of its stage, None for given weights."""
    trained = None if folder is None else stage_tensors(folder)
    return ready_teacher(settings.teacher, problem, trained)


def stage_tensors(folder: str) -> dict[str, Tensor]:
    """Returns the weights in the folder (path or URI) of a finished training stage."""
    with local_copy(f"{folder}/{CHECKPOINT}") as local:
        return load_folder(local)[0]
