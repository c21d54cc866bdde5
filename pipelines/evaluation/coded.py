"""Runs arms that are codecs on a batch of images, each image through its real stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mantis_core.codec.answer import Answer, Encoded
from mantis_core.codec.mantis import Mantis
from mantis_core.device.requests import Way
from mantis_core.tasks import Problem
from pipelines.evaluation.arms import EXAMPLES, ArmSource, Arrays
from pipelines.evaluation.rows import (
    SIZES,
    blank,
    count_pixels,
    with_labels_of_class,
    with_request_sizes,
)
from pipelines.settings.arms import ARM_KINDS


class Coded(NamedTuple):
    """What a codec made of a batch in one way: each image's stream, and the server's answer.

    `names_class` says whether the client's class is sent, or decides whether a latent is.
    """

    encoded: Sequence[Encoded]
    answers: Sequence[Answer]
    names_class: bool


def ways_of(
    source: ArmSource, model: Mantis, count: int, batch: Arrays, problem: Problem
) -> list[Way]:
    """Returns how an arm codes the `count` images of a batch.

    That is one way, but for a model that is asked: each task is then a request of its own.
    """
    if extends(model, problem):
        return [Way([task.name for task in problem.tasks], level=source.level)]
    if adds(model, problem):
        through = model.spec.added[-1].through
        return [Way(list(through) or None, level=source.level)]
    if ARM_KINDS[source.kind].answers != "oracle":
        if model.spec.model.requests == "asked":
            sure, level = source.exit_confidence, source.level
            return [Way(task.name, sure, level) for task in problem.tasks]
        return [Way(exit_confidence=source.exit_confidence, level=source.level)]
    asked = torch.zeros(count, len(problem.tasks), dtype=torch.bool)
    asked[: len(batch["task_mask"])] = torch.from_numpy(np.array(batch["task_mask"]))
    asked[~asked.any(dim=1), 0] = True  # a stream needs at least one task
    return [Way(asked, level=source.level)]


def code(model: Mantis, images: Tensor, ways: Sequence[Way]) -> list[Coded]:
    """Codes a batch in several ways. Each stream is decoded from its bytes alone."""
    known: dict[bytes, Answer] = {}
    coded = []
    for way, encoded in zip(ways, model.encode_each_way(images, ways), strict=True):
        new = [each.data for each in encoded if each.data not in known]
        known |= zip(new, model.decode(new), strict=True)
        answers = [known[each.data] for each in encoded]
        names_class = way.exit_confidence is not None or model.spec.sends_answer
        coded.append(Coded(encoded, answers, names_class))
    return coded


def adds(model: Mantis, problem: Problem) -> bool:
    """Returns whether the tasks of a problem are those that were added to a codec last."""
    count = len(problem.tasks)
    added = [own.task.name for own in model.spec.added]
    mine = bool(added) and added[-count:] == [task.name for task in problem.tasks]
    return mine or extends(model, problem)


def extends(model: Mantis, problem: Problem) -> bool:
    """Returns whether the tasks of a problem are those of a codec's last extension."""
    *others, last = model.spec.families
    return bool(others) and list(last) == [task.name for task in problem.tasks]


def run_added(ways: Sequence[Coded], batch: Arrays, problem: Problem) -> Arrays:
    """Returns the rows of a codec for the tasks that were added to it.

    Of images of one class the surest of their labels names it.
    """
    (coded,), tasks = ways, problem.tasks
    rows = _of_streams(coded, problem)
    rows["class_index"][:] = -1
    for index, answer in enumerate(coded.answers):
        rows["decoded"][index] = [task.name in answer.tasks for task in tasks]
        for k, task in enumerate(tasks):
            rows["predicted"][index, k] = answer.labels.get(task.name, -1)
        sure = {task: answer.label_probability.get(task.name, -1.0) for task in tasks}
        if problem.single_class and max(sure.values()) >= 0:
            best = max(sure, key=lambda task: sure[task])
            rows["class_index"][index] = best.classes[answer.labels[best.name]]
        if index < EXAMPLES:
            rows["answer"][index] = json.dumps(answer.to_dict(), allow_nan=False)
        if index < len(batch["task_mask"]):
            count_pixels(rows, index, batch, tasks, answer.segmentation)
    return rows


def run_codec(
    ways: Sequence[Coded], batch: Arrays, problem: Problem, *, oracle: bool = False
) -> Arrays:
    """Returns the rows of a codec. An `oracle` was told the tasks of each image."""
    if len(ways) > 1:
        return run_requests(ways, batch, problem)
    (coded,), tasks = ways, problem.tasks
    rows = _of_streams(coded, problem)
    for index, (sent, answer) in enumerate(zip(coded.encoded, coded.answers, strict=True)):
        rows["sent"][index] = sent.mask
        rows["decoded"][index] = [task.name in answer.tasks for task in tasks]
        rows["client_class"][index] = sent.client_class
        if index < EXAMPLES:
            rows["answer"][index] = json.dumps(answer.to_dict(), allow_nan=False)
        if not oracle:
            rows["probabilities"][index] = sent.probabilities
        for k, task in enumerate(tasks):
            rows["predicted"][index, k] = answer.labels.get(task.name, -1)
        if index < len(batch["task_mask"]):
            count_pixels(rows, index, batch, tasks, answer.segmentation)
    return rows


def run_requests(ways: Sequence[Coded], batch: Arrays, problem: Problem) -> Arrays:
    """Returns the rows of a codec that is asked for one task after the other.

    A size is the mean over the requests; those of each request stand beside it.
    """
    each = [_of_streams(coded, problem) for coded in ways]
    rows, tasks = blank(len(ways[0].encoded), problem.tasks), problem.tasks
    rows = with_request_sizes(
        rows, {name: np.stack([own[name] for own in each], axis=1) for name in SIZES}
    )
    rows["decoded"][:] = True
    rows["answered"] = np.mean([own["answered"] for own in each], axis=0)
    for k, (task, coded) in enumerate(zip(tasks, ways, strict=True)):
        for index, answer in enumerate(coded.answers):
            rows["predicted"][index, k] = answer.labels.get(task.name, -1)
            if index < len(batch["task_mask"]):
                count_pixels(rows, index, batch, (task,), answer.segmentation)
    for index in range(min(EXAMPLES, len(rows["answer"]))):
        said = [coded.answers[index].to_dict() for coded in ways]
        together = {**said[0], "tasks": [task.name for task in tasks]}
        for name in ("labels", "label_names", "label_probability", "segmentation"):
            together[name] = {key: value for own in said for key, value in own[name].items()}
        rows["answer"][index] = json.dumps(together, allow_nan=False)
    return rows


def run_student(ways: Sequence[Coded], batch: Arrays, problem: Problem) -> Arrays:
    """Returns the rows of a codec of one task, whose class answers the true tasks of an image."""
    (coded,) = ways
    rows = _of_streams(coded, problem)
    rows["decoded"][: len(batch["task_mask"])] = batch["task_mask"]
    if coded.names_class:
        rows["client_class"] = np.array([sent.client_class for sent in coded.encoded])
    return with_labels_of_class(rows, problem.tasks)


def _of_streams(coded: Coded, problem: Problem) -> Arrays:
    """Returns rows with the size of each stream and the class that the server answers."""
    rows = blank(len(coded.encoded), problem.tasks)
    for index, (sent, answer) in enumerate(zip(coded.encoded, coded.answers, strict=True)):
        rows["wire_bytes"][index] = len(sent.data)
        rows["payload_bytes"][index] = sent.payload_bytes
        rows["session_bytes"][index] = sent.session_bytes
        rows["estimated_bits"][index] = sent.estimated_bits
        rows["answered"][index] = sent.answered
        rows["class_index"][index] = answer.class_index
    return rows


CODED: dict[str, Callable[[Sequence[Coded], Arrays, Problem], Arrays]] = {
    "codec": run_codec,
    "oracle": partial(run_codec, oracle=True),
    "student": run_student,
}
"""The functions that `ArmKind.answers` names, of arms that are codecs."""
