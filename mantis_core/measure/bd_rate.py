"""From sizes and hits of every image to rate-accuracy points, BD figures and their intervals.

Shapes: P points (rates) of a curve, N images. Sizes are bytes, accuracies per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from bjontegaard import bd_linear, bd_rate
from numpy.typing import NDArray
from scipy.stats import t as student_t

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Demand:
    """What two curves must have for a figure.

    Each needs `points` that rise, and both a common range of top1 of `span` percentage points.
    """

    points: int = 4
    span: float = 8.0


REPLICATE_DEMAND = Demand(3, 4.0)
"""The demand on images drawn anew: to refuse those just short would bend the interval."""
REPLICATES = 1000


class CurveError(ValueError):
    """Two curves between which no BD figure can be given; the message says why."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One arm at one seed: for each rate each image's bytes and whether it was answered right.

    Of an image with several questions that is the share of right answers. `sizes` and `hits` are
    (P, N); the images are the same, in the same order, for all curves that are compared.
    """

    sizes: Array
    hits: NDArray[np.bool_] | Array

    def points(self, images: NDArray[np.int64] | None = None) -> Array:
        """(P, 2): mean bytes and top1 in per cent, of all images or those at indices `images`."""
        sizes, hits = self.sizes, self.hits
        if images is not None:
            sizes, hits = sizes[:, images], hits[:, images]
        return np.stack([sizes.mean(axis=1), 100 * hits.mean(axis=1)], axis=1)


@dataclass(frozen=True)
class Interval:
    """A figure over seeds: its mean, two 95 % intervals, and each seed's own value.

    `low` and `high` come from the bootstrap over images and seeds. `over_seeds` is the t interval
    over the seeds' own values, None for one seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    over_seeds: tuple[float, float] | None


def efficient(points: Array) -> Array:
    """The points (P, 2) by rising size, without those no better than a smaller one."""
    kept: list[Array] = []
    for point in points[np.argsort(points[:, 0], kind="stable")]:
        if not kept or (point[0] > kept[-1][0] and point[1] > kept[-1][1]):
            kept.append(point)
    return np.array(kept)


def delta_rate(anchor: Array, test: Array, demand: Demand = Demand()) -> float:
    """BD-rate in per cent: how many more bytes `test` needs than `anchor` at equal top1.

    Both are (P, 2) points. The mean over the common range of top1 of the difference of log10 bytes,
    each curve interpolated by PCHIP (after Bjontegaard, VCEG-M33, 2001).
    Raises CurveError with fewer points that rise, or a smaller common range, than `demand`.
    """
    one, two = _comparable(anchor, test, demand)
    return float(
        bd_rate(
            one[:, 0],
            one[:, 1],
            two[:, 0],
            two[:, 1],
            method="pchip",
            require_matching_points=False,
            min_overlap=0,
        )
    )


def delta_accuracy(anchor: Array, test: Array, demand: Demand = Demand()) -> float:
    """BD-accuracy: mean difference of top1, in points, over the common range of log10 bytes.

    Arguments and errors as `delta_rate`.
    """
    one, two = _comparable(anchor, test, demand)
    if min(one[-1, 0], two[-1, 0]) <= max(one[0, 0], two[0, 0]):
        raise CurveError("the curves have no common range of bytes")
    return float(
        bd_linear(
            np.log10(one[:, 0]),
            one[:, 1],
            np.log10(two[:, 0]),
            two[:, 1],
            method="pchip",
            require_matching_points=False,
            min_overlap=0,
        )
    )


def size_at(points: Array, accuracy: float) -> float | None:
    """Bytes at which a curve of (P, 2) points has this top1 in per cent; None beyond its ends.

    log10 bytes are taken as linear in top1 between two neighbours of the points that rise.
    """
    curve = efficient(points)
    if not curve[0, 1] <= accuracy <= curve[-1, 1]:
        return None
    return float(10 ** np.interp(accuracy, curve[:, 1], np.log10(curve[:, 0])))


def over_seeds(
    anchors: Sequence[Curve], tests: Sequence[Curve], *, seed: int = 0, accuracy: bool = False
) -> Interval:
    """BD figure of `tests` against `anchors`, paired by seed, with its intervals.

    The mean is that of the seeds' own figures. A replicate draws seeds and images anew with
    replacement. All its curves have the same images, for every seed was measured on the same:
    images drawn for each seed would average out, and the interval would be too narrow. Replicates
    short of REPLICATE_DEMAND are left out. Drawing from n seeds finds only (n - 1) / n of their
    variance, which for two or three is too little; the t interval is honest about that and wide.
    Raises CurveError as `delta_rate`, or if over half of the replicates are left out.
    """
    measure = delta_accuracy if accuracy else delta_rate
    own = tuple(
        measure(anchor.points(), test.points()) for anchor, test in zip(anchors, tests, strict=True)
    )
    rng = np.random.default_rng(seed)
    images = anchors[0].hits.shape[1]
    drawn: list[float] = []
    for _ in range(REPLICATES):
        pairs = rng.integers(len(own), size=len(own))
        chosen = rng.integers(images, size=images)
        try:
            values = {
                pair: measure(
                    anchors[pair].points(chosen), tests[pair].points(chosen), REPLICATE_DEMAND
                )
                for pair in set(pairs.tolist())
            }
        except CurveError:
            continue
        drawn.append(float(np.mean([values[pair] for pair in pairs.tolist()])))
    if len(drawn) < REPLICATES / 2:
        raise CurveError("over half of the bootstrap replicates give no figure: too few images")
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(np.mean(own)), float(low), float(high), own, t_interval(own))


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t over independent values; None for one value."""
    if len(values) < 2:
        return None
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(student_t.ppf(0.975, len(values) - 1)) * spread
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def label_floor_bits(classes: int, accuracy: float) -> float:
    """R(K, a): the fewest bits that carry one of K equiprobable labels at accuracy a (0..1).

    log2 K - h(1 - a) - (1 - a) log2(K - 1), for symmetric errors (Cover and Thomas, section 10.3);
    0 at chance and below.
    """
    if classes < 2 or accuracy <= 1 / classes:
        return 0.0
    wrong = 1 - accuracy
    entropy = 0.0 if wrong <= 0 else -wrong * math.log2(wrong) - accuracy * math.log2(accuracy)
    return math.log2(classes) - entropy - wrong * math.log2(classes - 1)


def _comparable(anchor: Array, test: Array, demand: Demand) -> tuple[Array, Array]:
    curves = (efficient(anchor), efficient(test))
    for name, points in zip(("first", "second"), curves, strict=True):
        if len(points) < demand.points:
            raise CurveError(
                f"the {name} curve has {len(points)} points that rise, {demand.points} are needed"
            )
    span = min(c[-1, 1] for c in curves) - max(c[0, 1] for c in curves)
    if span < demand.span:
        raise CurveError(
            f"the curves share {max(0.0, span):.1f} points of top1, {demand.span:g} are needed"
        )
    return curves
