"""What a task, a batch of labelled images, and the problem that the data poses are to the model.

Shapes: B batch, K tasks, C channels, H W pixels of the input image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mantis_core.errors import ModelError

IGNORE = 255
"""Segmentation label of pixels that count neither way."""


@dataclass(frozen=True)
class TaskSpec:
    """One named question with its own label set.

    `classes` holds, for each label of a classification task, the data set's global class index;
    it is empty for segmentation. `labels` are names for people, in label order. `parent` is the
    task one of whose labels is named as this task: where both are active, the server answers this
    one only if the answer to that one is that label. "" is none.
    """

    name: str
    kind: Literal["classification", "segmentation"]
    num_classes: int
    classes: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    parent: str = ""

    @property
    def is_classification(self) -> bool:
        return self.kind == "classification"


@dataclass(frozen=True)
class Batch:
    """Images with their labels, on one device.

    image (B, 3, H, W) uint8; class_label (B,) int64, -1 where the image has no single class;
    labels (B, K) int64, -1 where task k is not active; task_mask (B, K) bool;
    segmentation {task: (B, H, W) uint8}, IGNORE where unlabelled; row_id (B,) int64.
    """

    image: Tensor
    class_label: Tensor
    labels: Tensor
    task_mask: Tensor
    segmentation: dict[str, Tensor]
    row_id: Tensor

    def __len__(self) -> int:
        return int(self.image.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        own = (self.image, self.class_label, self.labels, self.task_mask, self.row_id)
        return sum(tensor.nbytes for tensor in (*own, *self.segmentation.values()))

    def as_one_task(self) -> Batch:
        """The same images with one task of all classes, active where an image has a class."""
        return replace(
            self, labels=self.class_label[:, None], task_mask=self.class_label[:, None] >= 0
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any], device: torch.device | str = "cpu") -> Batch:
        """A batch from the reader's dict of numpy arrays (keys `segmentation/<task>` for masks).

        On its way to a GPU an array is copied to pinned memory first: so the CPU need not wait.
        """
        on_gpu = torch.device(device).type == "cuda"

        def tensor(value: np.ndarray[Any, Any]) -> Tensor:
            array = value if value.flags.writeable else value.copy(order="K")
            own = torch.from_numpy(array)
            return (own.pin_memory() if on_gpu else own).to(device, non_blocking=True)

        prefix = "segmentation/"
        return cls(
            image=tensor(arrays["image"]),
            class_label=tensor(arrays["class_label"]),
            labels=tensor(arrays["labels"]),
            task_mask=tensor(arrays["task_mask"]),
            segmentation={
                key.removeprefix(prefix): tensor(value)
                for key, value in arrays.items()
                if key.startswith(prefix)
            },
            row_id=tensor(arrays["row_id"]),
        )


def parents_first(tasks: Sequence[TaskSpec]) -> list[int]:
    """The places of tasks, each parent before its children, otherwise in order."""
    place = {task.name: k for k, task in enumerate(tasks)}
    order: list[int] = []

    def add(k: int) -> None:
        if k not in order:
            if tasks[k].parent in place:
                add(place[tasks[k].parent])
            order.append(k)

    for k in range(len(tasks)):
        add(k)
    return order


def class_members(tasks: Sequence[TaskSpec], num_classes: int) -> Tensor:
    """Which global classes belong to each task: bool (K, num_classes); none to a segmentation.

    On the CPU, whatever the default device: modules count classes when they are built.
    """
    members = torch.zeros(len(tasks), num_classes, dtype=torch.bool, device="cpu")
    for k, task in enumerate(tasks):
        members[k, list(task.classes)] = True
    return members


def class_slots(tasks: Sequence[TaskSpec], num_classes: int) -> Tensor:
    """Where each global class stands among all tasks' labels laid end to end.

    Returns (num_classes, M) int64: M is the largest number of tasks that share a class; unused
    places hold the total number of labels, one past the last. A class of no task has none.
    """
    places: list[list[int]] = [[] for _ in range(num_classes)]
    position = 0
    for task in tasks:
        if not task.is_classification:
            continue
        for class_index in task.classes:
            places[class_index].append(position)
            position += 1
    width = max((len(place) for place in places), default=1) or 1
    return torch.tensor([place + [position] * (width - len(place)) for place in places])


@dataclass(frozen=True)
class Problem:
    """What the data asks of a model: tasks, classes, input size.

    `imagenet_indices` are the classes' ImageNet-1k indices, where all have one.
    """

    tasks: tuple[TaskSpec, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    single_class: bool
    image_size: tuple[int, int]
    short_side: int
    imagenet_indices: tuple[int, ...] | None = None


def one_task(problem: Problem) -> Problem:
    """The problem with all classes as one task. ModelError if images have no single class."""
    if not problem.single_class:
        raise ModelError(
            "model.single_task needs images of one class each; this data has images of several "
            "tasks: leave out the baseline `student`"
        )
    labels = tuple(problem.class_names)
    every = TaskSpec("all", "classification", len(labels), tuple(range(len(labels))), labels)
    return replace(problem, tasks=(every,))


def of_task(problem: Problem, task: TaskSpec) -> Problem:
    """The problem that one task alone poses: its labels are the classes."""
    if not task.is_classification:
        alone = replace(task, parent="")
        return replace(problem, tasks=(alone,), classes=(), class_names=(), single_class=False)
    alone = replace(task, classes=tuple(range(task.num_classes)), parent="")
    classes = tuple(problem.classes[c] for c in task.classes)
    return replace(
        problem, tasks=(alone,), classes=classes, class_names=task.labels, single_class=True
    )
