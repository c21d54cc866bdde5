"""What a client has to know of its model beside weights and tables. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

Requests: TypeAlias = Literal["detect", "asked", "both"]


@dataclass(frozen=True)
class ClientFacts:
    """A model as its client sees it; K tasks.

    `classes` are the classes of each task, in the order of its labels, () for a segmentation.
    `labels` (K,) are the tasks' numbers of labels where the client may answer itself, else ().
    `image_size` is (H, W).
    """

    tasks: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    image_size: tuple[int, int]
    short_side: int
    requests: Requests
    max_active_tasks: int
    send_probabilities: bool
    sends_answer: bool
    rate_levels: int

    def __post_init__(self) -> None:
        count = len(self.tasks)
        if not count or len(self.classes) != count or len(self.labels) not in (0, count):
            raise ValueError(
                f"{count} tasks, classes of {len(self.classes)}, labels of {len(self.labels)}"
            )
        flags = (self.send_probabilities, self.sends_answer)
        if not all(type(flag) is bool for flag in flags):
            raise ValueError(f"flags are {flags}, must be true or false")
        if self.requests not in get_args(Requests):
            raise ValueError(f"requests is {self.requests!r}, must be one of {get_args(Requests)}")
        counts = (*self.image_size, self.short_side, self.max_active_tasks, self.rate_levels)
        if len(self.image_size) != 2 or not all(type(n) is int and n >= 1 for n in counts):
            raise ValueError(f"sizes, tasks and levels are {counts}, must be numbers from 1")

    def to_json(self) -> dict[str, Any]:
        """What `facts_from` reads."""
        return asdict(self)


def facts_from(data: Mapping[str, Any]) -> ClientFacts:
    """Facts as `ClientFacts.to_json` gives them, once through JSON. ValueError for others."""
    try:
        return ClientFacts(
            **{
                **data,
                "tasks": tuple(map(str, data["tasks"])),
                "classes": tuple(tuple(map(int, own)) for own in data["classes"]),
                "labels": tuple(map(int, data["labels"])),
                "image_size": tuple(data["image_size"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"no facts of a client: {error}") from None
