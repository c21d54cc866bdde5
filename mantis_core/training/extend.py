"""Trains the server's answers to tasks that its client does not know, on latents that stay as they
are. Nothing else of the codec changes.

Shapes: B batch, K tasks of the client, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mantis_core.codec.adding import with_tasks
from mantis_core.codec.checkpoint import save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask
from mantis_core.config import ExtendConfig, LossTerm
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.inference import still
from mantis_core.networks.preprocessing import normalise
from mantis_core.rates import levels_of
from mantis_core.symbols import MAX_SYMBOL
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.teachers.teacher import freeze
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Measured, Recipe


def extend_recipe(config: ExtendConfig, base: Mantis, problem: Problem, *, seed: int) -> Recipe:
    """The codec `base` with the tasks of `problem` on its server.

    Raises ModelError for a task that does not fit, and for images of another size.
    """
    torch.manual_seed(seed)
    through = config.through
    if not through and base.spec.model.requests == "asked":
        through = base.spec.task_names
    added = [AddedTask(task=_own(task), through=through) for task in problem.tasks]
    return ExtendRecipe(with_tasks(base, added), problem, tuple(added), base.ids().model.hex())


class ExtendRecipe(Recipe):
    """Task losses on decoders and tails of added tasks; all else is frozen, in eval mode."""

    def __init__(
        self, student: Mantis, problem: Problem, added: tuple[AddedTask, ...], parent: str
    ) -> None:
        """`parent` is the id of the model before, in hexadecimal digits."""
        super().__init__(problem.tasks, {"tasks": LossTerm(criterion="TaskLosses")})
        freeze(student)
        for own in problem.tasks:
            for modules in (student.server.added.task_decoders, student.server.added.tails):
                modules[own.name].requires_grad_(True)
        self.student: Mantis = student
        self.added, self.parent = added, parent
        self.held_levels = levels_of(student.spec.rates)
        self.set_teacher(None)

    def train(self, mode: bool = True) -> Self:
        """Switches the mode of the added modules alone."""
        super().train(mode)
        self.student.train(False)
        self.student.server.added.train(mode)
        return self

    def measure(self, batch: Batch, progress: float) -> Measured:
        size = (batch.image.shape[2], batch.image.shape[3])
        with torch.no_grad():
            split, last = self._features(batch)
        server = self.student.server
        tasks = {own.task.name: server.added(own.task, split, last, size) for own in self.added}
        outputs = {"outputs": {"tasks": tasks, "loss_mask": batch.task_mask}}
        logits = {
            f"logits/{own.task.name}": tasks[own.task.name][:, :-1]
            for own in self.added
            if own.task.is_classification
        }
        sums = label_hits(logits, self.tasks, batch)
        return Measured((self.objective(outputs, {}, batch),), sums)

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Writes the codec, its tables and its client as they were."""
        assert isinstance(student, Mantis)
        save_model(folder, student.eval(), {**meta, "parent": self.parent})

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the server makes of the latents that the client sends of a batch."""
        student, images = self.student, normalise(batch.image)
        level = self._levels(batch)
        shares = shares_of(level, student.spec.num_rates)
        with still(student):
            view = student.client(images)
            latent, _ = student.client.code(view, self._condition(view.logits), shares)
            received = latent.float().round().clamp(-MAX_SYMBOL, MAX_SYMBOL)
            split, last = student.server.features(received, shares)
        return split, last

    def _condition(self, logits: Tensor) -> Tensor:
        """What the client's encoder reads (B, K): the tasks it is asked for, or what it detects."""
        through = self.added[0].through
        if not through or self.student.spec.model.requests == "detect":
            return torch.sigmoid(logits.float())
        asked = [name in through for name in self.student.spec.task_names]
        return torch.tensor(asked, device=logits.device).float().expand_as(logits)

    def _levels(self, batch: Batch) -> Tensor:
        """The rate level of each image (B,): in training at random, in eval mode `level`."""
        if not self.training:
            return torch.full_like(batch.row_id, self.level)
        count = self.student.spec.rate_levels
        return torch.randint(count, (len(batch),), device=batch.image.device)


def _own(task: TaskSpec) -> TaskSpec:
    """A task of another data set: its classes are none of the codec's."""
    return replace(task, classes=())
