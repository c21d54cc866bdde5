"""The task field: which tasks a stream carries and how probable they are, inside the coded number.

K tasks, A active ones. In this order:

    primary   the most probable active task, uniform over K
    count     A, by Elias' gamma code: its class, then the low bits
    members   for each other task in order, whether it is active: probability r / n, where r of the
              n tasks still to come are (enumerative coding, Cover 1973); nothing once r is 0 or n
    levels    where they are sent: that of the primary task l, probability 2**-(l + 1), the last
              takes what is left; those of the others in order, uniform from l to 15

A model of one task sends no more than the level. Depends on integers only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from mantis_core.bitstream.coder import (
    GAMMA_CLASS,
    PRECISION,
    TOTAL,
    RangeReader,
    RangeWriter,
    exact_model,
)
from mantis_core.bitstream.container import BitstreamError, Reason
from mantis_core.bitstream.entropy import stream

MAX_LEVEL = 15
_LEVEL_COUNTS = np.array([*(TOTAL >> level + 1 for level in range(MAX_LEVEL)), 2])
_LEVEL = exact_model(_LEVEL_COUNTS)


@dataclass(frozen=True)
class TaskField:
    """What a stream says of its tasks. ValueError if it contradicts itself.

    `mask` holds K booleans, at least one of them true; `primary` is the index of the most probable
    active task; `levels` holds one level (see `quantise_log2`) per active task in the order of the
    tasks, or is None where none are sent. No level is below the primary task's: it is the most
    probable.
    """

    mask: tuple[bool, ...]
    primary: int
    levels: tuple[int, ...] | None

    def __post_init__(self) -> None:
        active = self.active
        if self.primary not in active:
            raise ValueError(f"primary task {self.primary} is not among the active tasks {active}")
        if self.levels is None:
            return
        if len(self.levels) != len(active):
            raise ValueError(f"{len(self.levels)} levels for {len(active)} active tasks")
        least = self.levels[active.index(self.primary)]
        if not all(0 <= least <= level <= MAX_LEVEL for level in self.levels):
            raise ValueError(
                f"levels {self.levels}: need 0 to {MAX_LEVEL}, the primary task's {least} the least"
            )

    @property
    def active(self) -> list[int]:
        """Indices of the active tasks."""
        return [k for k, active in enumerate(self.mask) if active]


def put_task_field(writer: RangeWriter, field: TaskField) -> float:
    """Codes `field`; returns its cost in bits."""
    bits = 0.0
    tasks, active = len(field.mask), field.active
    if tasks > 1:
        writer.put(field.primary, stream.model.Uniform(tasks))
        size = len(active).bit_length() - 1
        writer.put(size, GAMMA_CLASS)
        bits += math.log2(tasks) + size + 1
        if size:
            writer.put(len(active) - (1 << size), stream.model.Uniform(1 << size))
            bits += size
    others = [task for task in range(tasks) if task != field.primary]
    to_place = len(active) - 1
    for left, task in zip(range(len(others), 0, -1), others, strict=True):
        if to_place in (0, left):
            break
        member = int(field.mask[task])
        model, counts = _membership(to_place, left)
        writer.put(member, model)
        bits += PRECISION - math.log2(counts[member])
        to_place -= member
    if field.levels is not None:
        first = field.levels[active.index(field.primary)]
        writer.put(first, _LEVEL)
        bits += PRECISION - math.log2(_LEVEL_COUNTS[first])
        span = MAX_LEVEL + 1 - first
        for task, level in zip(active, field.levels, strict=True):
            if task != field.primary and span > 1:
                writer.put(level - first, stream.model.Uniform(span))
                bits += math.log2(span)
    return bits


def take_task_field(reader: RangeReader, num_tasks: int, *, with_levels: bool) -> TaskField:
    """Reads a field of a model of `num_tasks` tasks. BitstreamError (corrupt) if it is none."""
    primary, count = 0, 1
    if num_tasks > 1:
        primary = reader.take(stream.model.Uniform(num_tasks))
        size = reader.take(GAMMA_CLASS)
        if 1 << size > num_tasks:
            raise BitstreamError(Reason.CORRUPT, f"over {num_tasks} tasks are said to be active")
        count = (1 << size) + (reader.take(stream.model.Uniform(1 << size)) if size else 0)
        if count > num_tasks:
            raise BitstreamError(Reason.CORRUPT, f"{count} of {num_tasks} tasks are active")
    mask = [task == primary for task in range(num_tasks)]
    others = [task for task in range(num_tasks) if task != primary]
    to_place = count - 1
    for left, task in zip(range(len(others), 0, -1), others, strict=True):
        if 0 < to_place < left:
            mask[task] = bool(reader.take(_membership(to_place, left)[0]))
        else:
            mask[task] = to_place > 0
        to_place -= mask[task]
    levels = None
    if with_levels:
        first = reader.take(_LEVEL)
        span = MAX_LEVEL + 1 - first
        levels = tuple(
            first + (reader.take(stream.model.Uniform(span)) if span > 1 else 0)
            if task != primary
            else first
            for task in range(num_tasks)
            if mask[task]
        )
    return TaskField(tuple(mask), primary, levels)


def quantise_log2(probability: float) -> int:
    """The level 0..15 nearest to -2 log2(probability): half-bit steps from 1 to 2**-7.5."""
    if math.isnan(probability):
        raise ValueError("a task probability is NaN")
    if probability <= 2.0 ** (-MAX_LEVEL / 2):
        return MAX_LEVEL
    return max(0, round(-2 * math.log2(probability)))


def dequantise_level(level: int) -> float:
    """The probability 2**(-level / 2) that a level stands for."""
    if not 0 <= level <= MAX_LEVEL:
        raise ValueError(f"level is {level}, must be 0 to {MAX_LEVEL}")
    return float(2.0 ** (-level / 2))


def log_probabilities(field: TaskField) -> list[float]:
    """log p_k as transmitted: -inf for tasks not sent, 0 where no probabilities were sent."""
    levels = iter(field.levels or ())
    return [
        -math.inf
        if not active
        else math.log(dequantise_level(next(levels)))
        if field.levels is not None
        else 0.0
        for active in field.mask
    ]


def put_primary(writer: RangeWriter, field: TaskField) -> float:
    """Codes the primary task of a reply, whose tasks the reader has asked for; returns bits."""
    active = field.active
    if len(active) == 1:
        return 0.0
    writer.put(active.index(field.primary), stream.model.Uniform(len(active)))
    return math.log2(len(active))


def take_primary(reader: RangeReader, asked: tuple[bool, ...]) -> TaskField:
    """Reads what `put_primary` wrote, given the tasks (K,) that were asked for."""
    active = [k for k, wanted in enumerate(asked) if wanted]
    first = reader.take(stream.model.Uniform(len(active))) if len(active) > 1 else 0
    return TaskField(asked, active[first], None)


@lru_cache(maxsize=1 << 16)
def _membership(to_place: int, left: int) -> tuple[Any, tuple[int, int]]:
    """Model and counts of "no, yes" for the next of `left` tasks, `to_place` of them active."""
    yes = min(TOTAL - 1, max(1, TOTAL * to_place // left))
    return exact_model(np.array([TOTAL - yes, yes])), (TOTAL - yes, yes)
