"""Rate-accuracy points of trials: objectives, Pareto front, hypervolume and early stopping.

Pure functions of an epoch's figures. Knows no Ray, no MLflow and no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Figures = Mapping[str, float]
Key = TypeVar("Key", bound=int | tuple[int, int])
Losses = tuple[float, ...]
"""One number per objective. Lower is better."""

CONTAINER_BYTES = 11  # header of a stream with one image of the model's size; docs/bitstream.md
CHEBYSHEV_SHARE = 0.05  # weight of the plain sum, which orders samples with equal maxima


@dataclass(frozen=True)
class RdPoint:
    """Rate and accuracy on the holdout rows.

    `wire_bytes` is the estimated mean size of a stream with one image: payload and container.
    `level` is the rate level of a model of several rates.
    """

    wire_bytes: float
    top1: float
    level: int | None = None


def rd_points(figures: Figures) -> tuple[RdPoint, ...]:
    """Returns the points of an epoch: one, or one of each rate of a model of several.

    They rise in level. Empty if a figure is missing or not finite.
    """
    levels = sorted(int(found[1]) for name in figures if (found := _OF_LEVEL.fullmatch(name)))
    points = []
    for level in levels or (None,):
        prefix = "holdout" if level is None else f"holdout/level-{level}"
        bits, top1 = figures.get(f"{prefix}/bits"), figures.get(f"{prefix}/top1")
        if bits is None or top1 is None or not (math.isfinite(bits) and math.isfinite(top1)):
            return ()
        points.append(RdPoint(bits / 8 + CONTAINER_BYTES, top1, level))
    return tuple(points)


_OF_LEVEL = re.compile(r"holdout/level-(\d+)/bits")


@dataclass(frozen=True)
class SearchObjective:
    """What a search minimises: `name` is one of OBJECTIVES.

    `reference` is that of hypervolumes. With `levels` each trial is a model of several rates, which
    has a front of its own.
    """

    name: str
    reference: RdPoint
    levels: bool = False

    @property
    def dimensions(self) -> int:
        """Returns the number of losses: two for the trade-off of trials that are one point each."""
        return 2 if self.name == "pareto" and not self.levels else 1

    def losses(self, figures: Figures) -> Losses | None:
        """Returns the values to minimise for an epoch; None if a figure is missing or not finite.

        Of a front of its own that is the hypervolume, with a minus.
        """
        points = rd_points(figures)
        if not points:
            return None
        if self.name == "pareto" and self.levels:
            losses: Losses = (-hypervolume(points, self.reference),)
        elif self.name == "pareto":
            losses = (math.log10(points[0].wire_bytes), -points[0].top1)
        else:
            losses = (_SIGNS[self.name] * figures.get(f"holdout/{self.name}", math.nan),)
        return losses if all(math.isfinite(loss) for loss in losses) else None


_SIGNS = {"top1": -1.0, "bits": 1.0, "loss": 1.0}
OBJECTIVES = ("pareto", *_SIGNS)
"""`--objective`: the rate-accuracy trade-off, or one figure of the holdout rows."""


def pareto_front(points: Mapping[Key, RdPoint]) -> list[Key]:
    """Returns the keys of the non-dominated points, by rising bytes.

    Of equal points the lowest key is kept.
    """
    front: list[Key] = []
    best = -math.inf
    for key in sorted(points, key=lambda key: (points[key].wire_bytes, -points[key].top1, key)):
        if points[key].top1 > best:
            best = points[key].top1
            front.append(key)
    return front


def hypervolume(points: Sequence[RdPoint], reference: RdPoint) -> float:
    """Returns the area in (log10 wire bytes, top1) between the points and the reference.

    Points that are not better than the reference in both are ignored.
    """
    inside = [p for p in points if p.wire_bytes < reference.wire_bytes and p.top1 > reference.top1]
    front = [inside[key] for key in pareto_front(dict(enumerate(inside)))]
    edges = [*(math.log10(point.wire_bytes) for point in front), math.log10(reference.wire_bytes)]
    return sum(
        (edges[index + 1] - edges[index]) * (point.top1 - reference.top1)
        for index, point in enumerate(front)
    )


def worst_corner(points: Sequence[RdPoint]) -> RdPoint:
    """Returns the most bytes and the lowest top1 of the points, as a reference for hypervolumes."""
    return RdPoint(max(p.wire_bytes for p in points), min(p.top1 for p in points))


def spread(points: Mapping[Key, RdPoint], most: int, reference: RdPoint) -> list[Key]:
    """Returns at most `most` keys of the front, by rising bytes.

    Chosen greedily, each to add the most hypervolume.
    """
    left = pareto_front(points)
    chosen: list[Key] = []

    def covered(keys: Sequence[Key]) -> float:
        return hypervolume([points[key] for key in keys], reference)

    while left and len(chosen) < most:
        best = max(left, key=lambda key: covered([*chosen, key]))
        left.remove(best)
        chosen.append(best)
    return sorted(chosen, key=lambda key: points[key].wire_bytes)


def scalar_cost(losses: Losses, weight: float, low: Losses, high: Losses) -> float:
    """Combines losses into one cost: the augmented weighted Chebyshev norm of ParEGO.

    `weight` (0 to 1) is that of the first objective. `low` and `high` are the bounds by which the
    losses are scaled. A single loss is returned as it is. Knowles, IEEE TEC 10(1), 2006.
    """
    if len(losses) == 1:
        return losses[0]
    shares = [
        share * (loss - least) / (most - least or 1.0)
        for share, loss, least, most in zip((weight, 1 - weight), losses, low, high, strict=True)
    ]
    return max(shares) + CHEBYSHEV_SHARE * sum(shares)


@dataclass(frozen=True)
class Halving:
    """Decides which trials continue past a rung: asynchronous successive halving (ASHA).

    Rungs count a trial's own finished epochs, so a resumed search decides as an uninterrupted one
    would. All losses at a rung are combined with the weight of the judged trial, because costs
    under different weights cannot be compared. Li et al., MLSys 2020.
    """

    epochs: int
    first_epochs: int
    factor: int

    @property
    def rungs(self) -> tuple[int, ...]:
        """Returns the epochs after which a trial is judged."""
        found, rung = [], self.first_epochs
        while rung < self.epochs:
            found.append(rung)
            rung *= self.factor
        return tuple(found)

    def goes_on(self, own: Losses, others: Sequence[Losses], weight: float) -> bool:
        """Returns True if the trial is among the best 1/factor at its rung, or on the front there.

        `others` are the losses of the other trials at that rung. No trial is stopped while fewer
        than `factor` trials have reached it. The front is kept because one random weight favours
        only a small part of it.
        """
        everyone = [own, *others]
        if len(everyone) < self.factor or not any(_beats(other, own) for other in others):
            return True
        low = tuple(min(values) for values in zip(*everyone, strict=True))
        high = tuple(max(values) for values in zip(*everyone, strict=True))
        cost = scalar_cost(own, weight, low, high)
        better = sum(scalar_cost(other, weight, low, high) < cost for other in others)
        return better < len(everyone) // self.factor


def _beats(one: Losses, other: Losses) -> bool:
    """Returns True if `one` dominates `other`: nowhere worse and somewhere better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
