"""Golden cases: images made by a rule, and the streams that a client gives for them.

They tell a device whether it codes as the machine that exported the client. The rule has integers
alone, so every machine makes the same pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mantis_core.bitstream.wire import read_stream, write_stream
from mantis_core.device.client import DeviceClient
from mantis_core.device.export import GOLDEN
from mantis_core.device.facts import ClientFacts
from mantis_core.errors import ModelError

COUNT = 100
OF_EXTENSION = 20
"""Cases of each extension, beside those of the client's own tasks."""
LEAST_SAME = 0.95
"""The share of streams that may not differ between two machines, or from torch."""
_SHAPES = 9
_TONE, _SHADE = 256, 64


@dataclass(frozen=True)
class Case:
    """One image by its number, what it is coded for, and its stream.

    `request` None detects; `level` is a rate level.
    """

    number: int
    request: tuple[str, ...] | None
    level: int
    stream: bytes


@dataclass(frozen=True)
class Found:
    """How many cases were coded, and for how many the networks gave the very same symbols."""

    cases: int
    same: int


def procedural_image(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (3, H, W): a gradient, and ellipses and stripes on it, from a linear congruential
    generator (Knuth's MMIX constants)."""
    height, width = size
    state = number * 2 + 1

    def draw(below: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % below

    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    image = np.empty((3, height, width), np.int64)
    for channel in image:
        down, across = draw(_TONE), draw(_TONE)
        channel[:] = (down * y // height + across * x // width) // 2
    for _ in range(_SHAPES):
        top, left = draw(height), draw(width)
        tall, wide = 2 + draw(1 + height // 2), 2 + draw(1 + width // 2)
        inside = (y - top) ** 2 * wide**2 + (x - left) ** 2 * tall**2 < (tall * wide) ** 2 // 4
        stripes = ((y * draw(4) + x * draw(4)) // (1 + draw(8))) % 2 * draw(_SHADE)
        for channel in image:
            channel[inside] = draw(_TONE) + stripes[inside]
    return image.clip(0, _TONE - 1).astype(np.uint8)


def ways(facts: ClientFacts, count: int = COUNT) -> list[tuple[tuple[str, ...] | None, int]]:
    """Request and level of each case: each task alone, all together and none, at every level."""
    requests: list[tuple[str, ...] | None] = []
    if facts.requests != "detect":
        requests += [(task,) for task in facts.tasks]
        requests += [facts.tasks] if len(facts.tasks) > 1 else []
    if facts.requests != "asked":
        requests.append(None)
    return [
        (requests[i % len(requests)], (i + i // len(requests)) % facts.rate_levels)
        for i in range(count)
    ]


def make(client: DeviceClient[NDArray[np.uint8]], count: int = COUNT) -> list[Case]:
    """The cases of a client whose images are arrays, and some of each extension."""
    cases = []
    for number, (request, level) in enumerate(ways(client.facts, count)):
        image = procedural_image(number, client.facts.image_size)[None]
        (stream,) = client.encode(image, request, level=level)
        cases.append(Case(number, request, level, stream))
    for own in client.extensions:
        cases += make(own, OF_EXTENSION)
    return cases


def check(client: DeviceClient[NDArray[np.uint8]], cases: Sequence[Case]) -> Found:
    """Codes all cases. ModelError where the symbols of a case are not coded as they were.

    Other processors round otherwise, so that a few symbols may differ; the coding may not.
    """
    same = 0
    for case in cases:
        own = client.for_tasks(case.request)
        known = read_stream(case.stream, own.tables, own.stream_spec)
        again = write_stream(known.images, known.input_shape, own.tables, own.stream_spec)
        if again.data != case.stream:
            raise ModelError(
                f"golden case {case.number}: the symbols of its stream are coded to other bytes on "
                "this machine; install the wheel of mantis-lite anew, or report it"
            )
        image = procedural_image(case.number, client.facts.image_size)[None]
        (stream,) = client.encode(image, case.request, level=case.level)
        same += stream == case.stream
    return Found(len(cases), same)


def write_cases(folder: str | Path, cases: Sequence[Case]) -> None:
    """Writes `golden.json`."""
    listed = [
        {
            "image": case.number,
            "request": None if case.request is None else list(case.request),
            "level": case.level,
            "stream": case.stream.hex(),
        }
        for case in cases
    ]
    (Path(folder) / GOLDEN).write_text(json.dumps(listed, indent=0) + "\n", encoding="utf-8")


def read_cases(folder: str | Path) -> list[Case]:
    """The cases of an export; ModelError where there are none."""
    try:
        listed = json.loads((Path(folder) / GOLDEN).read_text(encoding="utf-8"))
        cases = [
            Case(
                int(own["image"]),
                None if own["request"] is None else tuple(map(str, own["request"])),
                int(own["level"]),
                bytes.fromhex(own["stream"]),
            )
            for own in listed
        ]
        if not cases:
            raise ValueError("the list is empty")
        return cases
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(f"{folder} holds no golden cases: {error}") from None
