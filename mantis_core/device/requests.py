"""What images are coded for: tasks that are detected or asked for, a rate, a bound of bytes.

B images, K tasks, H W input pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from mantis_core.bitstream.wire import CodedImage
from mantis_core.device.facts import ClientFacts
from mantis_core.errors import ModelError


class BoolArray(Protocol):
    """A bool array (B, K) of numpy, or a tensor of torch."""

    @property
    def dtype(self) -> Any: ...

    @property
    def shape(self) -> Any: ...


Tasks: TypeAlias = str | Sequence[str] | BoolArray | None
"""Tasks that are asked for: names, one name, or a row for each image; None detects them."""


class Budget(NamedTuple):
    """The most bytes that an image may take, and how it is written to be measured."""

    max_bytes: int
    write: Callable[[CodedImage, tuple[int, int]], bytes]

    def holds(self, image: CodedImage, input_shape: tuple[int, int]) -> bool:
        """Whether an image of (H, W) pixels takes no more."""
        return len(self.write(image, input_shape)) <= self.max_bytes


class Way(NamedTuple):
    """One way to code images: arguments as `ClientCodec.encode`, with a budget for `max_bytes`."""

    tasks: Tasks = None
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


def check_images(images: Any, kind: type, what: str) -> None:
    """ModelError for what is no batch of images: a `kind`, which messages call `what`."""
    if not isinstance(images, kind):
        raise ModelError(
            f"images are a {type(images).__name__}; allowed: a uint8 {what} (B, 3, H, W)"
        )
    given: Any = images
    whole = given.ndim == 4 and given.shape[1] == 3 and min(given.shape[2:]) > 0
    if str(given.dtype).removeprefix("torch.") != "uint8" or not whole:
        raise ModelError(
            f"images are {given.dtype} {tuple(given.shape)}; allowed: uint8 (B, 3, H, W)"
        )


def with_only_task(facts: ClientFacts, way: Way) -> Way:
    """A way with its task named, where the model is asked and has but one."""
    if way.tasks is None and facts.requests == "asked" and len(facts.tasks) == 1:
        return way._replace(tasks=facts.tasks)
    return way


def check_asks(facts: ClientFacts, tasks: object) -> None:
    """ModelError where a model that is asked is not, or one that always detects is."""
    if facts.requests == "asked" and tasks is None:
        raise ModelError(
            "this model detects no tasks, its server asks for some: name one or more of "
            f"{', '.join(facts.tasks)}"
        )
    if facts.requests == "detect" and tasks is not None:
        raise ModelError(
            "this model detects the tasks of an image and cannot be asked for some: name none, or "
            "train it with model.requests=both"
        )


def asked_tasks(facts: ClientFacts, tasks: Tasks, count: int) -> NDArray[np.bool_]:
    """Tasks that are asked for of `count` images, as names or an array, as bool (count, K).

    Raises ModelError for what this model cannot be asked.
    """
    names = facts.tasks
    if is_array(tasks):
        allowed = ((count, len(names)), (1, len(names)))
        kind, shape = str(tasks.dtype).removeprefix("torch."), tuple(tasks.shape)
        if kind != "bool" or shape not in allowed:
            raise ModelError(
                f"tasks are {tasks.dtype} {shape}; allowed for {count} images: "
                f"bool {allowed[0]}, or {allowed[1]} for all of them; or names of tasks"
            )
        array: Any = tasks
        given = array.detach().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)
        empty = np.flatnonzero(~given.any(axis=1))
        if len(empty):
            raise ModelError(f"image {int(empty[0])} is asked about no task; name at least one")
        return np.broadcast_to(given, (count, len(names)))
    wanted = [tasks] if isinstance(tasks, str) else _listed(tasks)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        raise ModelError(
            f"tasks {unknown or 'none'} asked for; this model has {', '.join(names)}. A task that "
            "was added to its server is asked for by those that it is answered through; for one "
            "that its client has to know, `mantis patch` gives the client what it lacks"
        )
    return np.broadcast_to(np.array([name in wanted for name in names]), (count, len(names)))


def family_of(families: Sequence[Sequence[str]], tasks: Tasks) -> int:
    """Which of the groups of a model's tasks, whose streams have one id each, holds `tasks`.

    What is detected, given as an array or unknown belongs to the first one, the client's own.
    ModelError for tasks of several groups.
    """
    if tasks is None or is_array(tasks):
        return 0
    wanted = [tasks] if isinstance(tasks, str) else _listed(tasks)
    owners = {n: number for number, own in enumerate(families) for n in own}
    found: dict[int, list[str]] = {}
    for name in wanted:
        if name in owners:
            found.setdefault(owners[name], []).append(name)
    if len(found) > 1:
        groups = "; ".join(", ".join(found[number]) for number in sorted(found))
        raise ModelError(
            f"tasks {', '.join(wanted)} are sent in separate streams: ask once for each of these "
            f"groups: {groups}"
        )
    return next(iter(found), 0)


def check_family(families: Sequence[Sequence[str]], number: int, tasks: Tasks) -> None:
    """ModelError for tasks that a session of the group `number` does not carry."""
    if tasks is None or is_array(tasks):
        return
    wanted = [tasks] if isinstance(tasks, str) else _listed(tasks)
    others = {name for own in families for name in own} - set(families[number])
    if wrong := [name for name in wanted if name in others]:
        raise ModelError(
            f"tasks {', '.join(wrong)} are sent in streams of another id than this session's, "
            f"which carries {', '.join(families[number])}: open a session for them on both ends"
        )


def is_array(tasks: Tasks) -> TypeGuard[BoolArray]:
    """Whether tasks are given as an array, not as names; an array of text is names."""
    kind = getattr(tasks, "dtype", None)
    return not (kind is None or isinstance(tasks, str) or getattr(kind, "kind", "b") in "OUS")


def named_tasks(facts: ClientFacts, names: str | None) -> list[str] | None:
    """Tasks named in one text with commas between; None detects them, or asks for all of them."""
    if names is None:
        return list(facts.tasks) if facts.requests == "asked" else None
    return [name.strip() for name in names.split(",")]


def _listed(tasks: Any) -> list[str]:
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


def asked_levels(facts: ClientFacts, level: int | None, max_bytes: int | None) -> range:
    """The rate levels that an image may be coded at; ModelError for what the model has not."""
    count = facts.rate_levels
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


def check_exit(facts: ClientFacts, confidence: float | None) -> None:
    """ModelError for a confidence of early exit that this model cannot have."""
    if confidence is None:
        return
    if not facts.labels:
        needs = "model.detector.classes=true"
        if facts.requests == "asked":
            needs = "model.exit_heads=true"
        raise ModelError(
            "exit_confidence needs a client that can answer itself, and this model's cannot: train "
            f"it with {needs}, or leave exit_confidence out"
        )
    if not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
        raise ModelError(f"exit_confidence is {confidence!r}: give a probability, 0 to 1")


def active_tasks(
    probabilities: NDArray[np.float32], threshold: float, max_active: int
) -> NDArray[np.bool_]:
    """Which tasks the stream of an image carries, bool (K,), from p (K,).

    The tasks above `threshold`, but at most the `max_active` most probable. The most probable task
    is always among them.
    """
    best = np.argsort(-probabilities, kind="stable")[:max_active]
    mask = np.zeros(len(probabilities), np.bool_)
    mask[best] = probabilities[best] > np.float32(threshold)
    mask[best[0]] = True
    return mask
