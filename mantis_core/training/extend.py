"""Trains what tasks that are added to a codec have of their own; nothing else of it changes.

Of the grade `server` that are answers, on latents that stay as they are. Of the others it is an
extension: rows of the conditioning, adapters, a density and answers, for streams of their own.

Shapes: B batch, K tasks of the client, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mantis_core.codec.adding import with_extension, with_tasks
from mantis_core.codec.checkpoint import save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.spec import AddedTask
from mantis_core.config import ExtendConfig, LossTerm
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.extension import rank_within
from mantis_core.networks.inference import still
from mantis_core.networks.preprocessing import normalise
from mantis_core.patch import FOLDER, write_patch
from mantis_core.rates import levels_of, weight_at
from mantis_core.symbols import MAX_SYMBOL
from mantis_core.tasks import Batch, Problem, TaskSpec
from mantis_core.teachers.teacher import freeze
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Measured, Recipe


def extend_recipe(config: ExtendConfig, base: Mantis, problem: Problem, *, seed: int) -> Recipe:
    """The codec `base` with the tasks of `problem`, as the grade in `config` says.

    Raises ModelError for a task that does not fit, and for a rank that the client is too small for.
    """
    torch.manual_seed(seed)
    parent, tasks = base.ids().model.hex(), [_own(task) for task in problem.tasks]
    if config.grade != "server":
        rank = 0
        if config.grade == "adapter":
            rank = rank_within(base.client, base.spec.model.conditioning.kind, config.rank)
        student = with_extension(base, tasks, rank=rank, through=config.through)
        return ExtensionRecipe(student, problem, parent, config.rate_weight)
    through = config.through
    if not through and base.spec.model.requests == "asked":
        through = base.spec.task_names
    added = [AddedTask(task=task, through=through) for task in tasks]
    return ExtendRecipe(with_tasks(base, added), problem, tuple(added), parent)


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
        sums = label_hits(_logits(tasks, self.tasks), self.tasks, batch)
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
        return _levels(self, batch, self.student.spec.rate_levels)


class ExtensionRecipe(Recipe):
    """Task losses and rate on an extension, the last of the codec; all else is frozen.

    The rate weights are the codec's own. Each image of a step is coded at a random level.
    """

    level_weights: Tensor

    def __init__(self, student: Mantis, problem: Problem, parent: str, rate_weight: float) -> None:
        """`parent` is the id of the model before. `rate_weight` is for a codec of one rate."""
        super().__init__(problem.tasks, {"tasks": LossTerm(criterion="TaskLosses")})
        freeze(student)
        self.number = len(student.spec.extensions) - 1
        own = student.extension(self.number).requires_grad_(True)
        own.bottleneck.density.quantiles.requires_grad_(False)
        self.student: Mantis = student
        self.parent, rates = parent, student.spec.rates
        levels = range(student.spec.rate_levels)
        weights = [weight_at(rates, level) for level in levels] if rates else [rate_weight]
        self.register_buffer("level_weights", torch.tensor(weights), persistent=False)
        self.held_levels = levels_of(rates)
        self.set_teacher(None)

    def train(self, mode: bool = True) -> Self:
        """Switches the mode of the extension alone."""
        super().train(mode)
        self.student.train(False)
        self.student.extension(self.number).train(mode)
        return self

    def measure(self, batch: Batch, progress: float) -> Measured:
        student, images = self.student, normalise(batch.image)
        own, spec = student.extension(self.number), student.spec.extended(self.number)
        level = _levels(self, batch, spec.rate_levels)
        shares = shares_of(level, spec.num_rates)
        client = own.client.client(student.client, len(spec.tasks))
        everyone = torch.ones(len(images), len(spec.tasks), device=images.device)
        with torch.no_grad():
            view = client(images)
        latent = client.encode(view, everyone, shares)
        received = own.bottleneck(latent, everyone.bool(), torch.zeros_like(level), shares)
        split, last = student.server.features(received.y_hat, shares)
        size = (images.shape[2], images.shape[3])
        tasks = {task.name: own.server(task, split, last, size) for task in spec.tasks}
        outputs = {"outputs": {"tasks": tasks, "loss_mask": batch.task_mask}}
        rate = (self.level_weights[level] * received.bits).mean()
        sums = label_hits(_logits(tasks, self.tasks), self.tasks, batch)
        bits = received.bits.detach().sum()
        return Measured((self.objective(outputs, {}, batch, rate),), {**sums, "bits": bits})

    def save(
        self, student: nn.Module, folder: str | Path, kind: str, meta: Mapping[str, Any]
    ) -> None:
        """Makes the tables of the extension; writes the codec, and in it the patch for clients."""
        assert isinstance(student, Mantis)
        student.finish_extension(self.number)
        save_model(folder, student, {**meta, "parent": self.parent})
        write_patch(Path(folder) / FOLDER, student, self.number)


def _levels(recipe: Recipe, batch: Batch, count: int) -> Tensor:
    """The rate level of each image (B,): in training one of `count` at random, else `level`."""
    if not recipe.training:
        return torch.full_like(batch.row_id, recipe.level)
    return torch.randint(count, (len(batch),), device=batch.image.device)


def _logits(outputs: Mapping[str, Tensor], tasks: Sequence[TaskSpec]) -> dict[str, Tensor]:
    """The labels' part of what classification tasks are answered, by the name of a head."""
    return {
        f"logits/{task.name}": outputs[task.name][:, :-1]
        for task in tasks
        if task.is_classification
    }


def _own(task: TaskSpec) -> TaskSpec:
    """A task of another data set: its classes are none of the codec's."""
    return replace(task, classes=())
