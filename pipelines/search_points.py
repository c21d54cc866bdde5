"""Rate-accuracy points of trials: objectives, Pareto front, hypervolume, when a trial is stopped.

Pure functions over an epoch's figures; knows no Ray, no MLflow, no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[str, float]
Losses = tuple[float, ...]
"""One number for each objective, less is better."""

CONTAINER_BYTES = 11  # of a stream of one image of the model's own size; docs/bitstream.md
CHEBYSHEV_SHARE = 0.05  # of the plain sum beside the maximum, so that ties have an order


@dataclass(frozen=True)
class RdPoint:
    """Held-back rows at one epoch. `wire_bytes` are estimated: payload and container, an image."""

    wire_bytes: float
    top1: float


def rd_point(figures: Figures) -> RdPoint | None:
    """The point of an epoch's figures; None where one of them is missing or no number."""
    bits, top1 = figures.get("holdout/bits"), figures.get("holdout/top1")
    if bits is None or top1 is None or not (math.isfinite(bits) and math.isfinite(top1)):
        return None
    return RdPoint(bits / 8 + CONTAINER_BYTES, top1)


def losses_of(figures: Figures, objective: str) -> Losses | None:
    """What a search minimises of an epoch; None where a figure is missing or no number."""
    point = rd_point(figures)
    if point is None:
        return None
    losses = OBJECTIVES[objective](figures, point)
    return losses if all(math.isfinite(loss) for loss in losses) else None


def pareto_front(points: Mapping[int, RdPoint]) -> list[int]:
    """The keys of points that no other beats in both, by rising bytes; of equal ones the first."""
    front: list[int] = []
    best = -math.inf
    for key in sorted(points, key=lambda key: (points[key].wire_bytes, -points[key].top1, key)):
        if points[key].top1 > best:
            best = points[key].top1
            front.append(key)
    return front


def hypervolume(points: Sequence[RdPoint], reference: RdPoint) -> float:
    """The area in (log10 wire bytes, top1) that points cover up to a reference worse than them.

    What lies beyond the reference counts as far as it lies within.
    """
    inside = [p for p in points if p.wire_bytes < reference.wire_bytes and p.top1 > reference.top1]
    front = [inside[key] for key in pareto_front(dict(enumerate(inside)))]
    edges = [*(math.log10(point.wire_bytes) for point in front), math.log10(reference.wire_bytes)]
    return sum(
        (edges[index + 1] - edges[index]) * (point.top1 - reference.top1)
        for index, point in enumerate(front)
    )


def worst_corner(points: Sequence[RdPoint]) -> RdPoint:
    """Most bytes and lowest top1 among points: the reference of a comparison."""
    return RdPoint(max(p.wire_bytes for p in points), min(p.top1 for p in points))


def spread(points: Mapping[int, RdPoint], most: int, reference: RdPoint) -> list[int]:
    """At most so many keys of the front, those that cover most together, by rising bytes."""
    left, chosen = pareto_front(points), list[int]()

    def covered(keys: Sequence[int]) -> float:
        return hypervolume([points[key] for key in keys], reference)

    while left and len(chosen) < most:
        best = max(left, key=lambda key: covered([*chosen, key]))
        left.remove(best)
        chosen.append(best)
    return sorted(chosen, key=lambda key: points[key].wire_bytes)


def scalar_cost(losses: Losses, weight: float, low: Losses, high: Losses) -> float:
    """Losses as one number: their weighted Chebyshev norm within the bounds seen (ParEGO).

    `weight` (0 to 1) is that of the first objective. A single objective is itself.
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
    """Asynchronous successive halving (ASHA, stopping): who goes on after an epoch.

    The clock is a trial's own number of finished epochs, whatever process counted them, so a
    resumed search judges as the uninterrupted one. Other trials' losses are weighed anew by the
    weight of the trial that is judged: costs under different weights cannot be compared.
    """

    epochs: int
    first_epochs: int
    factor: int

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which a trial is judged."""
        found, rung = [], self.first_epochs
        while rung < self.epochs:
            found.append(rung)
            rung *= self.factor
        return tuple(found)

    def goes_on(self, own: Losses, others: Sequence[Losses], weight: float) -> bool:
        """Whether a trial is among the best 1/factor of those at its rung, or beaten by none there.

        `others` are their losses at that rung. With fewer than `factor` in all nobody is stopped.
        The random weight alone would stop most of the front: it seldom suits where a trial lies.
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
    """Whether one is nowhere worse and somewhere better."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _pareto(figures: Figures, point: RdPoint) -> Losses:
    return (math.log10(point.wire_bytes), -point.top1)


OBJECTIVES: dict[str, Callable[[Figures, RdPoint], Losses]] = {
    "pareto": _pareto,
    "top1": lambda figures, point: (-point.top1,),
    "bits": lambda figures, point: (figures["holdout/bits"],),
    "loss": lambda figures, point: (figures.get("holdout/loss", math.nan),),
}
"""`--objective`: a trade-off, or one figure of the held-back rows."""
