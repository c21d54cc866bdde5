"""Losses of all tasks at once are those of one task after the other, gradients too.

Shapes: B batch, n labels of a task, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from mantis_core.tasks import IGNORE, Batch, Problem, TaskSpec
from mantis_core.training.losses import (
    Criterion,
    FlatLabels,
    TaskLosses,
    TeacherDecision,
    TeacherLogits,
)

TEMPERATURE = 2.0
NOT_MINE = 0.3
SMOOTHING = 0.1
Tensors = dict[str, Tensor]
Reference = Callable[[Tensors, Tensors, Batch, Problem], Tensor]


def drawn(problem: Problem, count: int, *, more: int) -> Tensors:
    """Logits of each task: (B, n + more), or (B, n, H, W) of a segmentation."""
    size = problem.image_size
    return {
        task.name: torch.randn(count, task.num_classes + more)
        if task.is_classification
        else torch.randn(count, task.num_classes, *size)
        for task in problem.tasks
    }


def average(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros(())


def kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL of two rows of logits, times the square of the temperature."""
    p, q = (log_softmax(x / TEMPERATURE, dim=0) for x in (theirs, ours))
    return TEMPERATURE**2 * (p.exp() * (p - q)).sum()


def images_of(task: TaskSpec, batch: Batch, problem: Problem) -> list[int]:
    active = batch.task_mask[:, problem.tasks.index(task)]
    return [i for i in range(len(batch)) if active[i]]


def label_of(task: TaskSpec, image: int, batch: Batch, problem: Problem) -> Tensor:
    return batch.labels[image, problem.tasks.index(task)]


def of_pixels(logits: Tensor, task: TaskSpec, batch: Batch, problem: Problem) -> Tensor:
    losses = []
    for i in images_of(task, batch, problem):
        truth = batch.segmentation[task.name][i].long()
        kept = truth != IGNORE
        losses += [cross_entropy(logits[i, :, kept].T, truth[kept], reduction="none")]
    return torch.cat(losses).mean() if losses else torch.zeros(())


def task_losses(ours: Tensors, _: Tensors, batch: Batch, problem: Problem) -> Tensor:
    total = torch.zeros(())
    for task in problem.tasks:
        if not task.is_classification:
            total = total + of_pixels(ours[task.name], task, batch, problem)
            continue
        log_p, mine = log_softmax(ours[task.name], dim=1), images_of(task, batch, problem)
        right = [-log_p[i, label_of(task, i, batch, problem)] for i in mine]
        others = [-log_p[i, -1] for i in range(len(batch)) if i not in mine]
        total = total + average(right) + NOT_MINE * average(others)
    return total


def divergences(ours: Tensors, theirs: Tensors, batch: Batch, problem: Problem) -> Tensor:
    total = torch.zeros(())
    for task in problem.tasks:
        pair = ours[task.name][:, : task.num_classes], theirs[task.name]
        mine = images_of(task, batch, problem)
        if task.is_classification:
            total = total + average([kl(pair[0][i], pair[1][i]) for i in mine])
        else:
            flat = [x[mine].permute(0, 2, 3, 1).reshape(-1, task.num_classes) for x in pair]
            total = total + average([kl(*pixel) for pixel in zip(*flat, strict=True)])
    return total


def flat_labels(ours: Tensors, _: Tensors, batch: Batch, problem: Problem) -> Tensor:
    total = torch.zeros(())
    for task in problem.tasks:
        if not task.is_classification:
            total = total + of_pixels(ours[task.name], task, batch, problem)
            continue
        losses = []
        for i in images_of(task, batch, problem):
            target = torch.full((task.num_classes,), SMOOTHING / task.num_classes)
            target[label_of(task, i, batch, problem)] += 1 - SMOOTHING
            losses.append(-(target * log_softmax(ours[task.name][i], dim=0)).sum())
        total = total + average(losses)
    return total


def heads(tensors: Tensors) -> dict[str, Any]:
    return {f"logits/{name}": value for name, value in tensors.items()}


def tails(tensors: Tensors, batch: Batch) -> dict[str, Any]:
    """What a server gives: log P of classifications, with "not mine", and pixels' logits."""
    given = {n: log_softmax(v, dim=1) if v.dim() == 2 else v for n, v in tensors.items()}
    return {"tasks": given, "loss_mask": batch.task_mask}


CASES: dict[str, tuple[Callable[..., Criterion], Reference, bool]] = {
    "TaskLosses": (lambda tasks: TaskLosses(tasks, not_mine=NOT_MINE), task_losses, True),
    "TeacherDecision": (lambda tasks: TeacherDecision(tasks, TEMPERATURE), divergences, True),
    "TeacherLogits": (lambda tasks: TeacherLogits(tasks, TEMPERATURE), divergences, False),
    "FlatLabels": (lambda tasks: FlatLabels(tasks, label_smoothing=SMOOTHING), flat_labels, False),
}


@pytest.mark.parametrize("absent", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_task_after_task(
    name: str, absent: bool, mixed_problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    build, reference, of_server = CASES[name]
    problem = mixed_problem
    batch = batch_of(problem, count=5)
    if absent:  # no image has the second task
        mask = batch.task_mask.clone()
        mask[:, 1] = False
        batch = replace(batch, task_mask=mask)
    torch.manual_seed(0)
    ours = drawn(problem, len(batch), more=of_server)
    theirs = drawn(problem, len(batch), more=0)
    for value in ours.values():
        value.requires_grad_()

    student = tails(ours, batch) if of_server else heads(ours)
    found = build(problem.tasks)({"outputs": student}, {"outputs": heads(theirs)}, batch)
    expected = reference(ours, theirs, batch, problem)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    values = list(ours.values())
    for one, other in zip(
        *(torch.autograd.grad(loss, values, allow_unused=True) for loss in (found, expected)),
        strict=True,
    ):
        zero = torch.zeros(()) if one is None else torch.zeros_like(one)
        torch.testing.assert_close(
            zero if one is None else one, zero if other is None else other, atol=1e-5, rtol=1e-5
        )


def test_a_flat_teacher_is_compared_with_the_tails_class_by_class(
    mixed_problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    problem, batch = mixed_problem, batch_of(mixed_problem, count=5)
    torch.manual_seed(0)
    ours = drawn(problem, len(batch), more=1)
    flat = torch.randn(len(batch), len(problem.classes))
    term = TeacherDecision(problem.tasks, TEMPERATURE)
    found = term({"outputs": tails(ours, batch)}, {"outputs": {"logits": flat}}, batch)
    named = tuple(task for task in problem.tasks if task.is_classification)
    theirs = {task.name: softmax(flat, 1)[:, task.classes].log() for task in named}
    expected = divergences(ours, theirs, batch, replace(problem, tasks=named))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
