"""What a recipe is: the student of a stage, its loss and its eval-mode figures.

No optimiser, no loop, no data: `loop.py` drives any recipe. Shapes: B batch, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from mantis_core.architecture import ModelConfig
from mantis_core.config import LossTerm, Stage1Config, Stage2Config
from mantis_core.errors import ModelError
from mantis_core.folders import save_folder
from mantis_core.tasks import Batch, TaskSpec
from mantis_core.teachers.frozen import FrozenTeacher, Watch, watched
from mantis_core.teachers.teacher import Teacher, freeze
from mantis_core.training.losses import build_criterion, hooked_paths, measured_terms
from mantis_core.training.means import Mean, Objective, loss_of, loss_over_workers

DETECTION = ("TaskDetection", "ClassDetection")
"""The criteria that train the detector."""

Gather = Callable[[Tensor], Tensor]
"""Joins the (N, ...) tensors of all workers along their first dimension."""


@dataclass(frozen=True)
class StepOutput:
    """Loss to minimise, and figures as sums over `count` images (reduced by sum and count).

    `objectives` are what the loss was made of, in eval mode alone: the loss of many batches is
    joined from them.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    count: int
    objectives: tuple[Objective, ...] = ()


class Measured(NamedTuple):
    """What a recipe computed of a batch: its objectives, and figures as sums over the images."""

    objectives: tuple[Objective, ...]
    sums: dict[str, Tensor]


class Recipe(nn.Module):
    """What one stage computes. `student` is trained and shipped, everything else is frozen.

    `loaded` are the names of those parameters of the student that start from trained ones beside
    others that start at random. It is empty where all of them start alike. `held_levels` are the
    rate levels at which held-back rows are measured, in eval mode at `level` one after another;
    empty for a student of one rate.
    """

    student: nn.Module
    loaded: Collection[str] = ()
    held_levels: Sequence[int] = ()
    level: int = 0

    def __init__(self, tasks: Sequence[TaskSpec], losses: Mapping[str, LossTerm]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.losses = dict(losses)
        self.teacher: Teacher | None = None

    def set_teacher(self, teacher: Teacher | None, split: str = "", last: str = "") -> None:
        """Takes the frozen teacher and wires the loss terms to its modules and the student's."""
        self.teacher = None if teacher is None else freeze(teacher)  # type: ignore[assignment]
        self.criterion = build_criterion(self.losses, self.tasks, split=split, last=last)
        self.terms = nn.ModuleList(term for term, _ in self.criterion.term_dict.values())
        self.paths = hooked_paths(self.losses, split=split, last=last)
        _require_modules("student", self.student, self.paths[0])
        self.watching = (self.student, Watch(self._read_of_student()))
        if teacher is not None:
            _require_modules("teacher", teacher.backbone.net, self.paths[1])
            answers = any(getattr(term, "reads_teacher", False) for term in self.terms)
            self.frozen = FrozenTeacher(teacher, self.paths[1], answers=answers)

    def train(self, mode: bool = True) -> Self:
        """Switches the mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            self.frozen.eval()
        return self

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """One batch at `progress` (0 to 1 through training) to its loss and figures.

        In training mode the loss is this worker's part of that of all workers' rows, see
        `loss_over_workers`; in eval mode that of the batch.
        """
        objectives, sums = self.measure(batch, progress)
        loss, terms = loss_over_workers(objectives) if self.training else loss_of(objectives)
        with torch.no_grad():
            values = torch._foreach_mul(list(terms.values()), len(batch))
        figures = {f"loss/{name}": value for name, value in zip(terms, values, strict=True)}
        kept = () if self.training else objectives
        return StepOutput(loss, {**figures, **sums}, len(batch), kept)

    def measure(self, batch: Batch, progress: float) -> Measured:
        """What `forward` makes the loss of, on the rows of this batch alone."""
        raise NotImplementedError

    def calibrate(self, student: nn.Module, holdout: Iterable[Batch], gather: Gather) -> None:
        """Fits to held-back rows what no gradient trains, on `student`, in place.

        `holdout` may be this worker's share alone; `gather` then joins the tensors of all workers.
        """

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Writes a trained `student` of this recipe, in eval mode on the CPU, as a model folder.

        `kind` is the name of the training; config.yaml holds it where nothing else says what the
        weights are. `meta` goes into meta.json.
        """
        save_folder(folder, student.state_dict(), {"kind": kind}, meta)

    def teach(self, images: Tensor) -> dict[str, Any]:
        """The teacher's io dict on normalised images (B, 3, H, W): hooked modules and outputs."""
        with torch.no_grad():
            return self.frozen(images, self.teacher)  # type: ignore[no-any-return]

    def watch_student(self) -> AbstractContextManager[dict[str, Any]]:
        """A context that gives the student's io dict, to which the caller adds "outputs".

        It comes to hold what those modules return that the loss terms read. A student that takes
        the place of the recipe's own, as in evaluation, has its hooks set for this once.
        """
        own, watch = self.watching
        return watch.on() if self.student is own else watched(self._read_of_student())

    def _read_of_student(self) -> dict[str, nn.Module]:
        return {path: self.student.get_submodule(path) for path in self.paths[0]}

    def objective(
        self,
        student: dict[str, Any],
        teacher: dict[str, Any],
        batch: Batch,
        rate: Tensor | None = None,
    ) -> Objective:
        """The configured terms on io dicts, and the weighted mean `rate` () of the images' bits."""
        terms = measured_terms(self.criterion, student, teacher, batch)
        return Objective(terms, None if rate is None else Mean(rate, len(batch)))


def rate_weight(config: Stage1Config | Stage2Config, progress: float, *, training: bool) -> float:
    """The rate weight at `progress`: a linear ramp at the start of training, full in eval mode."""
    return config.rate_weight * ramp(config, progress, training=training)


def ramp(config: Stage1Config | Stage2Config, progress: float, *, training: bool) -> float:
    """The share of the rate weight that counts at `progress`, see `rate_weight`."""
    if not training or config.rate_ramp_fraction == 0:
        return 1.0
    return min(1.0, progress / config.rate_ramp_fraction)


def model_in_training(model: ModelConfig, config: Stage1Config | Stage2Config) -> ModelConfig:
    """The model section as a training has it: with the quantizer that is its own, if any."""
    return model.model_copy(update={"quantizer": config.quantizer or model.quantizer})


def without_detection(losses: Mapping[str, LossTerm]) -> dict[str, LossTerm]:
    """The terms that train anything but the detector, for a student that has none."""
    return {name: term for name, term in losses.items() if term.criterion not in DETECTION}


def check_detection(terms: Mapping[str, LossTerm], *, names_classes: bool) -> None:
    """Raises ModelError for a term on class logits where the detector names tasks alone."""
    for name, term in terms.items():
        if term.criterion == "ClassDetection" and not names_classes:
            raise ModelError(
                f"losses.{name}: ClassDetection trains a detector that names classes, and this one "
                f"names tasks: set model.detector.classes=true, or losses.{name}=null"
            )


def check_exits(terms: Mapping[str, LossTerm], *, has_heads: bool) -> None:
    """Raises ModelError for exit heads that no term trains, and for a term without heads."""
    named = [name for name, term in terms.items() if term.criterion == "ExitAnswers"]
    if named and not has_heads:
        raise ModelError(
            f"losses.{named[0]}: ExitAnswers trains exit heads, and this client has none: set "
            f"model.exit_heads=true for tasks that are classifications, or losses.{named[0]}=null"
        )
    if has_heads and not named:
        raise ModelError(
            "model.exit_heads: no loss trains them; add a term such as "
            "losses.exits={criterion: ExitAnswers, weight: 0.2}"
        )


def _require_modules(whose: str, module: nn.Module, paths: Sequence[str]) -> None:
    """ModelError for a path that a loss term names and the module lacks."""
    for path in paths:
        try:
            module.get_submodule(path)
        except AttributeError:
            has = ", ".join(name for name, _ in module.named_children())
            raise ModelError(
                f"a loss term compares {whose} module {path!r}, which this model lacks; at its top "
                f"are {has}. A term set to null is left out"
            ) from None
