"""What images are coded for: tasks that are detected or asked for, a rate, a bound of bytes.

B images, K tasks, H W input pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mantis_core.bitstream.wire import CodedImage
from mantis_core.codec.spec import ModelSpec
from mantis_core.errors import ModelError


class Budget(NamedTuple):
    """The most bytes that an image may take, and how it is written to be measured."""

    max_bytes: int
    write: Callable[[CodedImage, tuple[int, int]], bytes]

    def holds(self, image: CodedImage, input_shape: tuple[int, int]) -> bool:
        """Whether an image of (H, W) pixels takes no more."""
        return len(self.write(image, input_shape)) <= self.max_bytes


class Way(NamedTuple):
    """One way to code images: arguments as `ClientCodec.encode`, with a budget for `max_bytes`."""

    tasks: str | Sequence[str] | Tensor | None = None
    exit_confidence: float | None = None
    level: int | None = None
    budget: Budget | None = None


def listed_bytes(data: Iterable[bytes], what: str) -> list[bytes]:
    """Byte strings as a list, of one alone too; ModelError, which calls them `what`, for others."""
    given = [data] if isinstance(data, bytes | bytearray | memoryview | str) else data
    try:
        listed = list(given)
    except TypeError:
        listed = [given]  # type: ignore[list-item]
    bytelike = bytes | bytearray | memoryview
    if wrong := {type(each).__name__ for each in listed if not isinstance(each, bytelike)}:
        raise ModelError(f"{what} are {', '.join(sorted(wrong))}; allowed: a list of bytes")
    return [bytes(each) for each in listed]


def check_images(images: Tensor) -> None:
    """ModelError for what is no batch of images."""
    if not isinstance(images, Tensor):
        raise ModelError(
            f"images are a {type(images).__name__}; allowed: a uint8 tensor (B, 3, H, W)"
        )
    whole = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) > 0
    if images.dtype != torch.uint8 or not whole:
        raise ModelError(
            f"images are {images.dtype} {tuple(images.shape)}; allowed: uint8 (B, 3, H, W)"
        )


def with_only_task(spec: ModelSpec, way: Way) -> Way:
    """A way with its task named, where the model is asked and has but one."""
    if way.tasks is None and spec.model.requests == "asked" and len(spec.tasks) == 1:
        return way._replace(tasks=spec.task_names)
    return way


def check_asks(spec: ModelSpec, tasks: object) -> None:
    """ModelError where a model that is asked is not, or one that always detects is."""
    if spec.model.requests == "asked" and tasks is None:
        raise ModelError(
            "this model detects no tasks, its server asks for some: name one or more of "
            f"{', '.join(spec.task_names)}"
        )
    if spec.model.requests == "detect" and tasks is not None:
        raise ModelError(
            "this model detects the tasks of an image and cannot be asked for some: name none, or "
            "train it with model.requests=both"
        )


def asked_tasks(spec: ModelSpec, tasks: str | Sequence[str] | Tensor, count: int) -> Tensor:
    """Tasks that are asked for of `count` images, as names or a tensor, as bool (count, K).

    Raises ModelError for what this model cannot be asked.
    """
    names = spec.task_names
    if isinstance(tasks, Tensor):
        allowed = ((count, len(names)), (1, len(names)))
        if tasks.dtype != torch.bool or tuple(tasks.shape) not in allowed:
            raise ModelError(
                f"tasks are {tasks.dtype} {tuple(tasks.shape)}; allowed for {count} images: "
                f"bool {allowed[0]}, or {allowed[1]} for all of them; or names of tasks"
            )
        empty = (~tasks.any(dim=1)).nonzero()
        if len(empty):
            raise ModelError(f"image {int(empty[0])} is asked about no task; name at least one")
        return tasks.expand(count, -1)
    wanted = [tasks] if isinstance(tasks, str) else _listed(tasks)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ModelError(f"tasks {unknown or 'none'} asked for; this model has {', '.join(names)}")
    return torch.tensor([[name in wanted for name in names]]).expand(count, -1)


def named_tasks(spec: ModelSpec, names: str | None) -> list[str] | None:
    """Tasks named in one text with commas between; None detects them, or asks for all of them."""
    if names is None:
        return list(spec.task_names) if spec.model.requests == "asked" else None
    return [name.strip() for name in names.split(",")]


def _listed(tasks: Sequence[str]) -> list[str]:
    """The names of tasks; ModelError for what holds others than names."""
    try:
        names = list(tasks)
    except TypeError:
        names = [tasks]  # type: ignore[list-item]
    if not all(isinstance(name, str) for name in names):
        raise ModelError(
            f"tasks are {type(tasks).__name__}; allowed: names of tasks, or a bool tensor (B, K)"
        )
    return names


def asked_levels(spec: ModelSpec, level: int | None, max_bytes: int | None) -> range:
    """The rate levels that an image may be coded at; ModelError for what the model has not."""
    count = spec.rate_levels
    if level is not None and max_bytes is not None:
        raise ModelError("give a level or max_bytes, not both: max_bytes chooses the level")
    if max_bytes is not None and not (type(max_bytes) is int and max_bytes >= 1):
        raise ModelError(f"max_bytes is {max_bytes!r}: give a number of bytes from 1")
    if level is None:
        return range(count)
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level < count:
        has = f"this model has levels 0 to {count - 1}" if count > 1 else "this model has one rate"
        raise ModelError(f"level is {level!r}: {has}")
    return range(level, level + 1)


def check_exit(spec: ModelSpec, confidence: float | None) -> None:
    """ModelError for a confidence of early exit that this model cannot have."""
    if confidence is None:
        return
    if not spec.answerable():
        needs = "model.detector.classes=true"
        if spec.model.requests == "asked":
            needs = "model.exit_heads=true"
        raise ModelError(
            "exit_confidence needs a client that can answer itself, and this model's cannot: train "
            f"it with {needs}, or leave exit_confidence out"
        )
    if not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise ModelError(f"exit_confidence is {confidence!r}: give a probability, 0 to 1")


def select_mask(probabilities: Tensor, threshold: Tensor | float, max_active: int) -> Tensor:
    """Which tasks a stream carries, bool (B, K), from p (B, K).

    The tasks above `threshold`, but at most the `max_active` most probable. The most probable task
    is always among them.
    """
    best = probabilities.topk(min(max_active, probabilities.shape[1]), dim=1).indices
    allowed = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, best, True)
    mask = allowed & (probabilities > threshold)
    return mask.scatter(1, best[:, :1], True)


def primary_task(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Index (B,) of the most probable task among the active ones, p and mask being (B, K)."""
    return probabilities.masked_fill(~mask, -1.0).argmax(dim=1)


def coverage_threshold(
    probabilities: Tensor, truth: Tensor, coverage: float, *, limit: int
) -> float:
    """The highest threshold, at most 0.5, that keeps the share `coverage` of the true tasks.

    Both are (N, K). Whatever the threshold, the most probable task of an image is kept, and no task
    beyond its `limit` most probable: a lower threshold can only win true tasks between these.
    """
    order = probabilities.argsort(dim=1, descending=True).argsort(dim=1)
    sure = int((truth & (order == 0)).sum())
    needed = math.ceil(coverage * int(truth.sum())) - sure
    others = probabilities[truth & (order > 0) & (order < limit)].sort(descending=True).values
    if needed <= 0 or len(others) == 0:
        return 0.5
    lowest = float(others[min(needed, len(others)) - 1])
    return min(0.5, lowest * (1 - 1e-6))
