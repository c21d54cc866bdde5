"""The teacher: its own training on labels, and the frozen one that other stages distil."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mantis_core.config import SHIPPED, LossTerm, TeacherConfig
from mantis_core.errors import ModelError
from mantis_core.networks.inference import still
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem
from mantis_core.teachers.teacher import (
    Teacher,
    flat_teacher,
    load_backbone,
    shipped_state,
)
from mantis_core.teachers.weights import read_order, read_weights
from mantis_core.training.hits import label_hits
from mantis_core.training.recipe import Measured, Recipe

_FEW = 3  # images of a class from which on its most frequent answer counts
_MANY = 50  # images from which on the share of right ones counts


def new_teacher(config: TeacherConfig, problem: Problem) -> Teacher:
    """An untrained teacher: one flat head where each image has one class, else a head a task."""
    return Teacher(
        config.name,
        split=config.split,
        tasks=problem.tasks,
        flat_classes=len(problem.classes) if problem.single_class else 0,
        image_size=problem.image_size,
    )


def ready_teacher(
    config: TeacherConfig, problem: Problem, trained: Mapping[str, Tensor] | None
) -> Teacher:
    """The teacher to distil: `trained` by its own stage, with shipped weights, or from a file.

    Where all tasks are segmentations, one of the last two has features and no answers. Raises
    ModelError if weights and data do not fit.
    """
    if config.weights == "train":
        assert trained is not None
        teacher = new_teacher(config, problem)
        teacher.load_state_dict(dict(trained))
        return teacher
    if config.weights in SHIPPED:
        state = shipped_state(config.name, config.weights)
    else:
        state = read_weights(config.weights)
    if not problem.classes:  # segmentations alone: a teacher of features, without a head
        teacher = Teacher(config.name, split=config.split, image_size=problem.image_size)
        load_backbone(teacher, state)
    else:
        teacher = flat_teacher(
            config.name,
            state,
            split=config.split,
            classes=problem.classes,
            class_names=problem.class_names,
            imagenet_indices=problem.imagenet_indices,
            order=read_order(config.classes, problem.classes) if config.classes else None,
            image_size=problem.image_size,
            source=config.weights,
        )
    teacher.tasks = tuple(problem.tasks)
    return teacher


def teacher_recipe(config: TeacherConfig, problem: Problem, *, seed: int) -> Recipe:
    """A teacher to train, from random weights or from the backbone in `config.start`.

    Raises ModelError if those weights are another network's or cannot be downloaded.
    """
    torch.manual_seed(seed)
    teacher = new_teacher(config, problem)
    if config.start is not None:
        field = "teacher.start"
        if config.start in SHIPPED:
            state = shipped_state(config.name, config.start, field=field)
        else:
            state = read_weights(config.start, field=field)
        load_backbone(teacher, state, config.start)
    return TeacherRecipe(teacher, config)


def check_answers(teacher: Teacher, problem: Problem, batches: Iterable[Batch]) -> None:
    """Raises ModelError where a given teacher's logits do not answer labelled images.

    That is where it is right no more often than a guess, or where it takes classes for each other
    in a ring: each of them mostly for the next. Both are signs of logits in another order than the
    data's classes. Few images say little, and are let pass.
    """
    device = next(teacher.parameters()).device
    counts: dict[str, Tensor] = {}
    with torch.no_grad(), still(teacher):
        for batch in batches:
            logits = teacher(normalise(batch.image.to(device)))["logits"].cpu()
            for name, classes, truth in _questions(problem, batch):
                asked = truth >= 0
                said = logits[asked][:, classes].argmax(dim=1)
                size = len(classes)
                pairs = torch.bincount(truth[asked] * size + said, minlength=size * size)
                counts[name] = counts.get(name, 0) + pairs.view(size, size)
    for name, table in counts.items():
        labels = problem.class_names
        for task in problem.tasks:
            if task.name == name:
                labels = tuple(problem.class_names[c] for c in task.classes)
        if fault := wrong_order(table, labels):
            raise ModelError(
                f"teacher.weights: {fault}. Its logits may stand in another order than the data's "
                f"classes ({', '.join(problem.classes[:3])}, ...): name the class of each logit in "
                "the file teacher.classes, or set teacher.classes=sorted for a network that was "
                "trained on class folders. Else give the weights of a network for these classes"
            )


def wrong_order(table: Tensor, labels: Sequence[str]) -> str | None:
    """What is wrong with answers, if they look like those of logits in another order.

    `table` (n, n) counts images by true label and by answer.
    """
    images = table.sum(dim=1)
    size, seen = len(table), images > 0
    if size < 2:
        return None
    mostly = table.argmax(dim=1)
    clear = (images >= _FEW) & (2 * table.max(dim=1).values > images)
    for first in range(size):
        ring, at = [first], int(mostly[first])
        while bool(clear[ring[-1]]) and at not in ring:
            ring.append(at)
            at = int(mostly[at])
        if bool(clear[ring[-1]]) and at == first and len(ring) > 1:
            names = [labels[label] for label in (*ring, first)]
            said = ", ".join(f"{a!r} for {b!r}" for a, b in itertools.pairwise(names[:4]))
            return f"the teacher takes most images of {said}"
    if int(images.sum()) < _MANY:
        return None
    recall = float((table.diagonal()[seen] / images[seen]).mean())
    chance = 1 / size
    error = math.sqrt(chance * (1 - chance) * float((1 / images[seen]).sum())) / int(seen.sum())
    if recall <= chance + error:
        return (
            f"the teacher is right about {recall:.1%} of the images of each class, a guess about "
            f"{chance:.1%}"
        )
    return None


def _questions(problem: Problem, batch: Batch) -> Iterator[tuple[str, list[int], Tensor]]:
    """What a flat head can be asked: a name, the classes that may be answered, and labels (B,).

    The class of each image, or the label of each task where images have several. -1 is no label.
    """
    if problem.single_class:
        yield "", list(range(len(problem.classes))), batch.class_label.cpu()
        return
    for k, task in enumerate(problem.tasks):
        if task.is_classification:
            yield task.name, list(task.classes), batch.labels[:, k].cpu()


class TeacherRecipe(Recipe):
    """Trains a teacher on labels, with one flat head or a head for each task."""

    def __init__(self, teacher: Teacher, config: TeacherConfig) -> None:
        smoothing = {"label_smoothing": config.label_smoothing}
        super().__init__(
            teacher.tasks, {"labels": LossTerm(criterion="FlatLabels", kwargs=smoothing)}
        )
        self.student = teacher
        self.set_teacher(None)

    def measure(self, batch: Batch, progress: float) -> Measured:
        student = {"outputs": self.student(normalise(batch.image))}
        objective = self.objective(student, {"outputs": {}}, batch)
        return Measured((objective,), label_hits(student["outputs"], self.tasks, batch))
