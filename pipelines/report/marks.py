"""Computes the points of each kind of arm over size and draws them. Knows no page and no file.

Colours follow Okabe and Ito, so colour-blind readers can distinguish them. Markers differ as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from statistics import fmean
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from pipelines.settings.arms import ARM_KINDS

Arms = Sequence[Mapping[str, Any]]
_REQUEST = re.compile(r"val/task/.+/session_bytes")


@dataclass(frozen=True, order=True)
class Point:
    """The means of bytes and per cent of one kind at one rate. `seeds` has those of each seed."""

    size: float
    value: float
    seeds: tuple[tuple[float, float], ...]


def asks(arms: Arms) -> bool:
    """Returns whether the server asks in this experiment: an arm has a size for each request."""
    return any(_REQUEST.fullmatch(name) for arm in arms for name in arm["metrics"])


def sizes_of(arms: Arms, task: str | None = None) -> tuple[str, ...]:
    """Returns the metrics that stand for the size of an arm, of which it has one or more.

    Where the server asks that is the size in a session, with `task` that of the request for it.
    """
    if not asks(arms):
        return ("val/wire_bytes",)
    return (*([f"val/task/{task}/session_bytes"] if task else []), "val/session_bytes")


def label_of(arms: Arms, kind: str) -> str:
    """Returns the label of a kind, as its arms have it."""
    own = (arm["label"] for arm in arms if arm["kind"] == kind and "label" in arm)
    return next(own, ARM_KINDS[kind].label)


def curves(
    arms: Arms, metric: str, sizes: Sequence[str] = ("val/wire_bytes",)
) -> dict[str, list[Point]]:
    """Returns the points of each kind that has the metric, by rising size.

    A size is the first of the metrics `sizes` that an arm has, and 0 for a kind that sends nothing.
    A point belongs to one rate weight, or to a quality and a scale. Of a kind with several scales
    it keeps the points that no smaller one surpasses.
    """
    found: dict[str, dict[Any, list[tuple[float, float]]]] = {kind: {} for kind in ARM_KINDS}
    for arm in arms:
        metrics, kind = arm["metrics"], arm["kind"]
        sent = (metrics[name] for name in sizes if name in metrics)
        size = next(sent, None) if ARM_KINDS[kind].sends else 0.0
        if metric in metrics and size is not None:
            rate = (arm["rate_weight"], arm["quality"], arm.get("scale"))
            found[kind].setdefault(rate, []).append((size, 100 * metrics[metric]))
    drawn = {}
    for kind, rates in found.items():
        points = sorted(
            Point(fmean(x for x, _ in seeds), fmean(y for _, y in seeds), tuple(seeds))
            for seeds in rates.values()
        )
        scales = {scale for _, _, scale in rates}
        if points:
            drawn[kind] = envelope(points) if len(scales) > 1 else points
    return drawn


def envelope(points: Sequence[Point]) -> list[Point]:
    """Returns the points, which rise in size, without those no better than a smaller one."""
    kept: list[Point] = []
    for point in points:
        if not kept or point.value > kept[-1].value:
            kept.append(point)
    return kept


HEADLINES = {"val/top1": "top-1", "val/miou": "mean IoU"}
"""What may stand for the accuracy of an arm, and its name."""


def headline(arms: Arms) -> str:
    """Returns the metric that stands for accuracy: mean IoU if no arm has top-1, else top-1."""
    has = {name for name in HEADLINES if any(name in arm["metrics"] for arm in arms)}
    return "val/miou" if has == {"val/miou"} else "val/top1"


def stroke(kind: str, *, scale: float = 1.0) -> dict[str, Any]:
    """Returns the line and marker of a kind. The gid becomes the classes of an SVG group."""
    look, main = ARM_KINDS[kind].look, kind == "mantis"
    return {
        "gid": f"mark kind-{kind}" + " hollow" * look.hollow,
        "color": look.colour,
        "linestyle": (0, look.dash) if look.dash else "solid",
        "linewidth": scale * (2.6 if main else 1.6),
        "marker": look.marker if ARM_KINDS[kind].sends else "",  # a height has no ends
        "markerfacecolor": "none" if look.hollow else look.colour,
        "markersize": scale * (10 if look.marker == "*" else 7),
        "markeredgewidth": scale * 1.4,
        "zorder": 4 if main else 3,
    }


def draw_arms(
    axes: Axes, arms: Arms, metric: str, sizes: Sequence[str], *, scale: float = 1.0
) -> None:
    """Draws the curves of one metric over one of size.

    Single seeds are faint marks. A kind that sends nothing is a horizontal line.
    """
    axes.set_xscale("log")
    for kind, points in curves(arms, metric, sizes).items():
        if not ARM_KINDS[kind].sends:
            axes.axhline(points[0].value, **{**stroke(kind, scale=scale), "zorder": 1})
            continue
        own, values = [point.size for point in points], [point.value for point in points]
        axes.plot(own, values, **stroke(kind, scale=scale))
        seeds = [seed for point in points if len(point.seeds) > 1 for seed in point.seeds]
        if seeds:
            faint = {"linestyle": "none", "alpha": 0.4, "zorder": 2}
            axes.plot(*zip(*seeds, strict=True), **{**stroke(kind, scale=scale / 2), **faint})


def scale_axes(axes: Axes, *, labels: int) -> None:
    """Sets ticks and limits. The axes span at least a factor of 4 and 10 points of accuracy.

    With less, noise would look like a steep curve.
    """
    low, high = axes.get_xlim()
    widen = max(1.0, 4 * low / high) ** 0.5
    axes.set_xlim(low / widen, high * widen)
    low, high = axes.get_ylim()
    middle, half = (low + high) / 2, max(5.0, (high - low) / 2)
    axes.set_ylim(max(0.0, middle - half), min(102.0, middle + half))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    log_ticks(axes, labels=labels)


def log_ticks(axes: Axes, *, labels: int) -> None:
    """Puts at most about `labels` ticks on the log x axis: steps of 1, 2, 5, or 1, 3, or 10."""
    low, high = axes.get_xlim()
    decades = log10(high / low)
    steps = next((s for s in ((1, 2, 5), (1, 3)) if len(s) * decades <= labels), (1,))
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def add_key(parent: Figure | Axes, marks: Sequence[Artist], **where: Any) -> None:
    """Adds a key with the labels of `marks`, by default below all axes of a figure."""
    key = parent.legend(handles=marks, **{"loc": "outside lower left", **where})
    copies = [handle for handle in key.legend_handles if handle is not None]
    for mark, copy in zip(marks, copies, strict=True):
        copy.set_gid(mark.get_gid())
