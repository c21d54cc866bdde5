"""The figures of a report, drawn by matplotlib; reads evaluation arms, writes no file.

Colours follow Okabe and Ito, told apart by colour-blind readers; shapes and names differ as well.
An SVG takes its colours from the page, so it is readable on light and dark; a PNG stands on white.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

INK = "#010203"  # stands for the page's text colour in an SVG
RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Look:
    """How a kind of arm is drawn: `colour` on white, `dark` on the page's dark ground."""

    label: str
    colour: str
    dark: str
    marker: str


LOOKS = {
    "mantis": Look("MANTiS", "#0072B2", "#56B4E9", "o"),
    "none": Look("no conditioning", "#D55E00", "#F08A4B", "s"),
    "oracle": Look("oracle tasks", "#009E73", "#2FC99B", "^"),
    "individual": Look("individual models", "#B5568B", "#E29AC2", "D"),
    "teacher": Look("teacher", "#6B6B6B", "#A9B2BA", "v"),
    "none_prior": Look("no conditioning, task prior", "#A87B00", "#E8C14F", "P"),
    "early_exit": Look("MANTiS, early exit", "#0B3C8C", "#8FB4FF", "*"),
    "none_exit": Look("no conditioning, early exit", "#9C4400", "#FFB27F", "s"),
    "student": Look("entropic student", "#A23B3B", "#E88A8A", "<"),
    "per_task": Look("individual codecs", "#3A3A3A", "#D5DADE", "d"),
    "jpeg": Look("JPEG + teacher", "#8A6D5B", "#C9A993", "X"),
    "webp": Look("WebP + teacher", "#7A5FB0", "#B7A3E6", "p"),
    "avif": Look("AVIF + teacher", "#4F7F86", "#8FC1C8", "h"),
    "jpeg_tuned": Look("JPEG + tuned teacher", "#8A6D5C", "#C9A994", "X"),
    "webp_tuned": Look("WebP + tuned teacher", "#7A5FB1", "#B7A3E7", "p"),
    "avif_tuned": Look("AVIF + tuned teacher", "#4F7F87", "#8FC1C9", "h"),
}
COMPRESSED = tuple(kind for kind in LOOKS if kind not in ("individual", "teacher"))
HOLLOW = ("oracle", "none_exit", "per_task", "jpeg_tuned", "webp_tuned", "avif_tuned")
LEVEL_DASHES = {"individual": (0, (1, 2)), "teacher": (0, (3.5, 2))}  # uncompressed: a height alone
KEY_BESIDE = 6.0  # inches; a narrower figure has its key below
KEY_STYLE: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9,
    "title_fontsize": 9,
    "alignment": "left",
    "borderpad": 0.2,
    "handlelength": 1.7,
    "handletextpad": 0.5,
}


@dataclass(frozen=True)
class Point:
    """Means over the seeds of one kind at one rate; `values` holds each seed's."""

    size: float
    value: float
    values: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Limits:
    """Axis limits: x bytes, y per cent."""

    x: tuple[float, float]
    y: tuple[float, float]


def rd_figure(
    arms: Sequence[Mapping[str, Any]], *, width: float, metric: str = "val/top1"
) -> Figure:
    """`metric` in per cent over mean wire bytes per image, log x; `width` in inches.

    The key stands beside the axes, or below them where the figure is narrow, highest end first.
    """
    ends = {kind: _end(arms, kind, metric) for kind in LOOKS}
    kinds = sorted((k for k in LOOKS if ends[k] is not None), key=lambda k: -(ends[k] or 0.0))
    beside = width >= KEY_BESIDE
    height = min(5.2, width * 0.6) if beside else width * 0.8 + 0.21 * (len(kinds) + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    limits = _limits(arms, [metric])
    inches = (width - 3.6, height - 0.6) if beside else (width - 0.8, width * 0.8 - 0.6)
    _draw_rd(axes, arms, metric, limits, inches=inches[0])
    _name_levels(axes, arms, metric, limits, inches=inches)
    axes.set_xlabel("mean wire bytes per image (log scale)")
    axes.set_ylabel(_axis_label(metric))
    figure.legend(
        [Line2D([], [], **_stroke(kind)) for kind in kinds],
        [f"{LOOKS[kind].label}  {ends[kind]:.1f} %" for kind in kinds],
        title=f"{_axis_label(metric).removesuffix(' (%)')} at the largest size",
        loc="outside right upper" if beside else "outside lower left",
        **KEY_STYLE,
    )
    return figure


def task_figure(
    arms: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]], *, width: float
) -> Figure:
    """One small panel a task, all on the same axes, under one key."""
    rows = -(-len(tasks) // max(1, round(width / 1.9)))
    columns = -(-len(tasks) // rows)
    metrics = [task_metric(task) for task in tasks]
    kinds = [k for k in LOOKS if any(_end(arms, k, metric) is not None for metric in metrics)]
    in_a_line = max(1, round(width / 2.2))
    height = 2.2 * rows + 0.5 + 0.2 * -(-len(kinds) // in_a_line)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    limits = _limits(arms, metrics)
    kinds_of_task = {task["kind"] for task in tasks}
    for axes, task in itertools.zip_longest(itertools.chain.from_iterable(grid), tasks):
        if task is None:
            axes.set_visible(False)
            continue
        inches = (width - 0.5) / columns - 0.3
        _draw_rd(axes, arms, task_metric(task), limits, inches=inches)
        measure = " (mIoU)" if len(kinds_of_task) > 1 and task["kind"] == "segmentation" else ""
        title = textwrap.fill(task["name"] + measure, max(8, int(inches * 72 / 5.5)))
        axes.set_title(title, fontsize=9, loc="left", fontweight="bold")
        axes.tick_params(labelbottom=True)
    figure.supxlabel("mean wire bytes per image (log scale)", fontsize=10)
    label = _axis_label(metrics[0]) if len(kinds_of_task) == 1 else "top-1 accuracy or mean IoU (%)"
    figure.supylabel(label, fontsize=10)
    figure.legend(
        [Line2D([], [], **_stroke(kind, small=True)) for kind in kinds],
        [LOOKS[kind].label for kind in kinds],
        loc="outside upper left",
        ncols=in_a_line,
        columnspacing=2.0 if width >= KEY_BESIDE else 0.6,
        **KEY_STYLE,
    )
    return figure


def detection_figure(arms: Sequence[Mapping[str, Any]], *, width: float) -> Figure:
    """Coverage, the share of true tasks kept, over mean active tasks, for arms that rank tasks."""
    figure = Figure(figsize=(width, min(3.8, width * 0.95)), layout="constrained")
    axes = figure.add_subplot()
    most = 2.0
    for kind, arm in ranking_arms(arms).items():
        sizes, shares = zip(*arm["detection_curve"], strict=True)
        most = max(most, *sizes)
        look = LOOKS[kind]
        dashes = LEVEL_DASHES.get(kind, "solid")
        percent = [100 * share for share in shares]
        name = "teacher's own ranking" if kind == "teacher" else f"{look.label}'s detector"
        axes.plot(sizes, percent, color=look.colour, linestyle=dashes, linewidth=1.8, label=name)
        metrics = arm["metrics"]
        if "val/detection/coverage" in metrics:
            chosen = metrics["val/detection/active_tasks"], 100 * metrics["val/detection/coverage"]
            most = max(most, chosen[0])
            name = f"as measured: {chosen[1]:.1f} % with {chosen[0]:.2f} tasks"
            mark = {"color": look.colour, "markersize": 8, "linestyle": "none", "label": name}
            axes.plot(*chosen, look.marker, **mark)
    axes.set_xlim(0.95, min(most, 6.0) * 1.02)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("mean active tasks per image")
    axes.set_ylabel("coverage: true tasks kept (%)")
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.7)
    columns = 3 if width >= KEY_BESIDE else 1
    figure.legend(loc="outside upper left", ncols=columns, **KEY_STYLE)
    return figure


def ranking_arms(arms: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The first MANTiS arm and the teacher, where they have a detection curve."""
    found = {}
    for kind in ("mantis", "teacher"):
        own = [a for a in arms if a["kind"] == kind and a.get("detection_curve")]
        found.update({kind: own[0]} if own else {})
    return found


def task_metric(task: Mapping[str, Any]) -> str:
    """The metric a task is judged by: val/task/<name>/top1 or .../miou."""
    measure = "miou" if task["kind"] == "segmentation" else "top1"
    return f"val/task/{task['name']}/{measure}"


def curve(arms: Sequence[Mapping[str, Any]], kind: str, metric: str) -> list[Point]:
    """Points of one kind by rising size: one a rate weight or quality, the mean over its seeds."""
    by_rate: dict[Any, list[tuple[float, float]]] = {}
    for arm in arms:
        found = arm["metrics"]
        if arm["kind"] == kind and metric in found and "val/wire_bytes" in found:
            point = (found["val/wire_bytes"], 100 * found[metric])
            by_rate.setdefault((arm["rate_weight"], arm["quality"]), []).append(point)
    points = [
        Point(fmean(x for x, _ in seeds), fmean(y for _, y in seeds), tuple(seeds))
        for seeds in by_rate.values()
    ]
    return sorted(points, key=lambda point: point.size)


def level(arms: Sequence[Mapping[str, Any]], kind: str, metric: str) -> float | None:
    """The mean over seeds, in per cent, of a kind that sends no stream."""
    values = [a["metrics"][metric] for a in arms if a["kind"] == kind and metric in a["metrics"]]
    return 100 * fmean(values) if values else None


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """An <svg> element in the page's own text colour; `name` keeps its ids apart from others'."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**RC, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    for kind, look in LOOKS.items():  # the page has a lighter set of colours for the dark
        text = text.replace(look.colour.lower(), f"var(--{kind})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A style sheet in an inline SVG would hold for the whole page.
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    # Its size is the page's business: the viewBox stays, width and height go.
    head, body = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + body


def styled() -> Any:
    """The context figures are drawn in; matplotlib reads most of it while drawing."""
    return matplotlib.rc_context(RC)


def _draw_rd(
    axes: Axes, arms: Sequence[Mapping[str, Any]], metric: str, limits: Limits, *, inches: float
) -> None:
    """Curves and levels on axes about `inches` wide."""
    small = inches < 2.5
    axes.set(xscale="log", xlim=limits.x, ylim=limits.y)
    for kind in COMPRESSED:
        points = curve(arms, kind, metric)
        sizes, values = [point.size for point in points], [point.value for point in points]
        axes.plot(sizes, values, **_stroke(kind, small=small))
        for point in points:
            if len(point.values) > 1:
                seeds = zip(*point.values, strict=True)
                mark = {"markersize": 2.5 if small else 4, "alpha": 0.4, "zorder": 2}
                axes.plot(*seeds, **{**_stroke(kind), "linestyle": "none", **mark})
    for kind in LEVEL_DASHES:
        height = level(arms, kind, metric)
        if height is not None:
            axes.plot(limits.x, (height, height), **_stroke(kind))
    labelled = _labelled_sizes(limits, inches)
    axes.set_xticks(labelled, [f"{tick:,}" for tick in labelled])
    axes.set_xticks([t for t in _sizes(range(1, 10), limits) if t not in labelled], minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.7)


def _stroke(kind: str, *, small: bool = False) -> dict[str, Any]:
    """A kind's line and marker, the same on the axes and in the key; MANTiS lies on top."""
    look = LOOKS[kind]
    if kind in LEVEL_DASHES:
        dashes = LEVEL_DASHES[kind]
        return {"color": look.colour, "linestyle": dashes, "linewidth": 1.6, "zorder": 1}
    main = kind == "mantis"
    return {
        "color": look.colour,
        "marker": look.marker,
        "markerfacecolor": "none" if kind in HOLLOW else look.colour,
        "markersize": 4 if small else 6.5,
        "markeredgewidth": 1.0 if small else 1.4,
        "linewidth": (2.4 if main else 1.4) * (0.75 if small else 1),
        "zorder": 4 if main else 3,
    }


def _name_levels(
    axes: Axes,
    arms: Sequence[Mapping[str, Any]],
    metric: str,
    limits: Limits,
    *,
    inches: tuple[float, float],
) -> None:
    """Names the uncompressed heights on their lines; where no place is free the key must do.

    `inches` are about the axes' width and height.
    """
    bottom, span = limits.y[0], limits.y[1] - limits.y[0]
    decades = math.log(limits.x[1] / limits.x[0])
    taken = []  # shares of the axes: marks, and places between them on the lines
    for kind in COMPRESSED:
        points = curve(arms, kind, metric)
        spots = [(math.log(p.size / limits.x[0]) / decades, p.value) for p in points]
        for (x, y), (right, top) in itertools.pairwise([*spots, *spots[-1:]]):
            taken += [(x + (right - x) * t / 8, y + (top - y) * t / 8) for t in range(8)]
    heights = {kind: level(arms, kind, metric) for kind in LEVEL_DASHES}
    drawn = [(height, kind) for kind, height in heights.items() if height is not None]
    for height, kind in sorted(drawn, reverse=True):
        text = f"{LOOKS[kind].label} {height:.1f} %"
        wide = 5.5 * len(text) / 72 / inches[0]  # points of bold DejaVu, the widest of RC, at 9
        rise = 17 / 72 / inches[1] * span
        for start, up in itertools.product((0.0, 1 - wide, 0.2, 0.35, 0.5), (True, False)):
            low, high = (height, height + rise) if up else (height - rise, height)
            end = start + wide
            lines = [(start, other) for other, _ in drawn if other != height]
            near = [x for x, y in [*taken, *lines] if start <= x <= end + 0.02 and low <= y <= high]
            if near or low < bottom or end > 1.001:
                continue
            axes.annotate(
                text,
                (start + 0.01, height),
                xycoords=axes.get_yaxis_transform(),
                xytext=(0, 3 if up else -3),
                textcoords="offset points",
                va="bottom" if up else "top",
                color=LOOKS[kind].colour,
                fontsize=9,
                fontweight="bold",
            )
            taken += [(start + wide * t / 8, (low + high) / 2) for t in range(9)]
            break


def _end(arms: Sequence[Mapping[str, Any]], kind: str, metric: str) -> float | None:
    """What the key says of a kind, in per cent: its largest point's value, or its level."""
    if kind in LEVEL_DASHES:
        return level(arms, kind, metric)
    points = curve(arms, kind, metric)
    return points[-1].value if points else None


def _limits(arms: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> Limits:
    """Room for all points; at least a factor 4 and 10 points, so that noise does not look steep."""
    points = [p for kind in COMPRESSED for metric in metrics for p in curve(arms, kind, metric)]
    sizes = [size for point in points for size, _ in point.values] or [100.0]
    values = [value for point in points for _, value in point.values]
    levels = [level(arms, kind, metric) for kind in LEVEL_DASHES for metric in metrics]
    values = [*values, *(value for value in levels if value is not None)] or [50.0]
    low, high = min(sizes) / 1.3, max(sizes) * 1.3
    widen = max(1.0, 4 / (high / low)) ** 0.5
    middle, half = (min(values) + max(values)) / 2, (max(values) - min(values)) / 2 * 1.2
    half = max(half, 5.0)
    y = (max(0.0, middle - half), min(102.0, middle + half))
    return Limits((low / widen, high * widen), y)


def _sizes(steps: Iterable[int], limits: Limits) -> list[int]:
    found = [step * 10**power for power in range(9) for step in steps]
    return [size for size in found if limits.x[0] <= size <= limits.x[1]]


def _labelled_sizes(limits: Limits, inches: float) -> list[int]:
    """The sizes written below the axis: as many a decade as do not touch."""
    decades = math.log10(limits.x[1] / limits.x[0])
    for steps in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = _sizes(steps, limits)
        letters = max((len(f"{size:,}") for size in found), default=1)
        nearest = min(math.log10(b / a) for a, b in itertools.pairwise((*steps, 10)))
        if inches * 72 * nearest / decades >= 6.4 * letters + 6:  # points: DejaVu's digits at 10
            break
    return found


def _axis_label(metric: str) -> str:
    return "mean IoU (%)" if metric.endswith("miou") else "top-1 accuracy (%)"
