"""The weights that a training builds on: those of finished stages, or given ones of the teacher."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from data_prep.manifest import read_manifest
from data_prep.read.batches import local_batches
from mantis_core.folders import load_folder
from mantis_core.tasks import Batch
from mantis_core.training.teacher import check_answers, ready_teacher
from pipelines.settings.sections import TEACHER_KEYWORDS, Settings
from pipelines.storage import local_copy
from pipelines.training.files import CHECKPOINT

if TYPE_CHECKING:
    from torch import Tensor

    from mantis_core.tasks import Problem
    from mantis_core.teachers.teacher import Teacher

_ASKED = 256  # images that a teacher from a file is asked about
_AT_ONCE = 32


class Weights(Protocol):
    """Where a recipe takes the weights that it starts from."""

    def teacher(self, settings: Settings, problem: Problem) -> Teacher:
        """Returns the frozen teacher."""
        ...

    def check(self, teacher: Teacher, settings: Settings, problem: Problem) -> None:
        """Raises ModelError if a teacher from a file does not know the images."""
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

    def check(self, teacher: Teacher, settings: Settings, problem: Problem) -> None:
        """Asks a teacher from a file about images of the prepared folder, see `check_given`."""
        check_given(teacher, settings, problem, self.folders["prepare"])

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Returns the weights of a finished stage."""
        return stage_tensors(self.folders[kind])


def load_teacher(settings: Settings, problem: Problem, folder: str | None) -> Teacher:
    """Returns the frozen teacher. `folder` is that of its stage, None for given weights."""
    trained = None if folder is None else stage_tensors(folder)
    return ready_teacher(settings.teacher, problem, trained)


def check_given(teacher: Teacher, settings: Settings, problem: Problem, prepared: str) -> None:
    """Raises ModelError if a teacher from a file does not know the images in folder `prepared`.

    Asks it about held-back rows, and about training rows if there are few of those.
    """
    if settings.teacher.weights in TEACHER_KEYWORDS:
        return
    manifest, reading = read_manifest(prepared), settings.data.reading
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = min(_AT_ONCE, manifest.split("train").rows)
    held_back = local_batches(prepared, manifest, reading, split="holdout", global_batch=size)
    trained_on = local_batches(prepared, manifest, reading, global_batch=size, epoch=0)
    arrays = itertools.islice(itertools.chain(held_back, trained_on), _ASKED // _AT_ONCE)
    try:
        check_answers(teacher.to(device), problem, (Batch.from_arrays(each) for each in arrays))
    finally:
        teacher.cpu()


def stage_tensors(folder: str) -> dict[str, Tensor]:
    """Returns the weights in the folder (path or URI) of a finished training stage."""
    with local_copy(f"{folder}/{CHECKPOINT}") as local:
        return load_folder(local)[0]
