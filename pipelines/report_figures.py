"""The figures of a report, drawn by matplotlib; reads evaluation arms, writes no file.

Colours follow Okabe and Ito, told apart by colour-blind readers; shapes and names differ as well.
An SVG takes its colours from the page, so it is readable on light and dark; a PNG stands on white.
"""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    label: str
    colour: str
    marker: str


LOOKS = {
    "mantis": Look("MANTiS", "#0072B2", "o"),
    "none": Look("no conditioning", "#D55E00", "s"),
    "oracle": Look("oracle tasks", "#009E73", "^"),
    "individual": Look("individual models", "#B5568B", "D"),
    "teacher": Look("teacher", "#6B6B6B", "v"),
    "none_prior": Look("no conditioning, task prior", "#C99700", "P"),
    "student": Look("entropic student", "#A23B3B", "<"),
    "per_task": Look("individual codecs", "#4A9BC4", "d"),
    "jpeg": Look("JPEG + teacher", "#8A6D5B", "X"),
    "webp": Look("WebP + teacher", "#7A5FB0", "p"),
    "avif": Look("AVIF + teacher", "#4F7F86", "h"),
    "jpeg_tuned": Look("JPEG + tuned teacher", "#8A6D5C", "X"),
    "webp_tuned": Look("WebP + tuned teacher", "#7A5FB1", "p"),
    "avif_tuned": Look("AVIF + tuned teacher", "#4F7F87", "h"),
}
COMPRESSED = tuple(kind for kind in LOOKS if kind not in ("individual", "teacher"))
HOLLOW = ("oracle", "per_task", "jpeg_tuned", "webp_tuned", "avif_tuned")
LEVEL_DASHES = {"individual": (0, (1, 2)), "teacher": (0, (5, 3))}  # uncompressed: a height alone


@dataclass(frozen=True)
class Point:
    """Means over the seeds of one kind at one rate; `values` holds each seed's."""

    size: float
    value: float
    values: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Limits:
    """Axis limits: x bytes, y per cent; right of `names_from` there are names only."""

    x: tuple[float, float]
    y: tuple[float, float]
    names_from: float


def rd_figure(
    arms: Sequence[Mapping[str, Any]], *, width: float, metric: str = "val/top1"
) -> Figure:
    """`metric` in per cent over mean wire bytes per image, log x; `width` in inches."""
    figure = Figure(figsize=(width, min(4.6, width * 0.95)), layout="constrained")
    axes = figure.add_subplot()
    limits = _limits(arms, [metric], names=min(0.5, 1.75 / width))
    _draw_rd(axes, arms, metric, limits)
    _name_directly(axes, arms, metric, limits)
    axes.set_xlabel("mean size on the wire (bytes per image, log scale)")
    axes.set_ylabel(_axis_label(metric))
    return figure


def task_figure(
    arms: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]], *, width: float
) -> Figure:
    """One small panel a task, all on the same axes; the shapes are those of the first figure."""
    columns = max(1, min(len(tasks), round(width / 2.3)))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(width, 2.2 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    limits = _limits(arms, [task_metric(task) for task in tasks])
    cells = list(itertools.chain.from_iterable(grid))
    for axes, task in itertools.zip_longest(cells, tasks):
        if task is None:
            axes.set_visible(False)
            continue
        _draw_rd(axes, arms, task_metric(task), limits)
        axes.set_title(task["name"], fontsize=10, loc="left", fontweight="bold")
        axes.tick_params(labelbottom=True)
    figure.supxlabel("bytes per image (log scale)", fontsize=10)
    kinds = {task["kind"] for task in tasks}
    figure.supylabel(_axis_label(task_metric(tasks[0])) if len(kinds) == 1 else "%", fontsize=10)
    return figure


def detection_figure(arms: Sequence[Mapping[str, Any]], *, width: float) -> Figure:
    """Share of true tasks kept over the mean number of active tasks, for arms that rank tasks."""
    figure = Figure(figsize=(width, min(3.6, width * 0.9)), layout="constrained")
    axes = figure.add_subplot()
    most = 1.0
    for kind, arm in ranking_arms(arms).items():
        sizes, shares = zip(*arm["detection_curve"], strict=True)
        most = max(most, *sizes)
        look = LOOKS[kind]
        dashes = LEVEL_DASHES.get(kind, "solid")
        percent = [100 * share for share in shares]
        name = "teacher's own" if kind == "teacher" else f"{look.label}'s detector"
        axes.plot(sizes, percent, color=look.colour, linestyle=dashes, linewidth=1.8, label=name)
        metrics = arm["metrics"]
        if "val/detection/coverage" in metrics:
            chosen = metrics["val/detection/active_tasks"], 100 * metrics["val/detection/coverage"]
            axes.plot(*chosen, look.marker, color=look.colour, markersize=7)
    axes.set_xlim(1, min(most, 6.0))
    axes.set_xlabel("mean active tasks per image")
    axes.set_ylabel("true tasks among them (%)")
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.7)
    axes.legend(frameon=False, loc="lower right")
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


def _draw_rd(axes: Axes, arms: Sequence[Mapping[str, Any]], metric: str, limits: Limits) -> None:
    axes.set(xscale="log", xlim=limits.x, ylim=limits.y)
    for kind in COMPRESSED:
        look, points = LOOKS[kind], curve(arms, kind, metric)
        axes.plot(
            [point.size for point in points],
            [point.value for point in points],
            color=look.colour,
            marker=look.marker,
            markerfacecolor="none" if kind in HOLLOW else look.colour,
            markersize=7,
            markeredgewidth=1.5,
            linewidth=1.8,
            zorder=3,
        )
        for point in points:
            if len(point.values) > 1:
                seeds = zip(*point.values, strict=True)
                axes.plot(*seeds, look.marker, color=look.colour, alpha=0.4, markersize=4, zorder=2)
    for kind, dashes in LEVEL_DASHES.items():
        height = level(arms, kind, metric)
        if height is not None:
            line = {"color": LOOKS[kind].colour, "linestyle": dashes, "linewidth": 1.6}
            axes.plot((limits.x[0], limits.names_from), (height, height), zorder=1, **line)
    ticks = [tick for tick in _nice_sizes() if limits.x[0] <= tick <= limits.names_from]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.7)


def _limits(
    arms: Sequence[Mapping[str, Any]], metrics: Sequence[str], *, names: float = 0.0
) -> Limits:
    """Room for all points; at least a factor 4 and 10 points, so that noise does not look steep.

    `names` is the share of the width kept free on the right.
    """
    points = [p for kind in COMPRESSED for metric in metrics for p in curve(arms, kind, metric)]
    sizes = [size for point in points for size, _ in point.values] or [100.0]
    values = [value for point in points for _, value in point.values]
    levels = [level(arms, kind, metric) for kind in LEVEL_DASHES for metric in metrics]
    values = [*values, *(value for value in levels if value is not None)] or [50.0]
    low, high = min(sizes) / 1.3, max(sizes) * 1.3
    widen = max(1.0, 4 / (high / low)) ** 0.5
    low, high = low / widen, high * widen
    middle, half = (min(values) + max(values)) / 2, (max(values) - min(values)) / 2 * 1.2
    half = max(half, 5.0)
    y = (max(0.0, middle - half), min(102.0, middle + half))
    right = low * (high / low) ** (1 / (1 - names))
    return Limits((low, right), y, high)


def _nice_sizes() -> list[int]:
    return [step * 10**power for power in range(8) for step in (1, 2, 5)]


def _name_directly(
    axes: Axes, arms: Sequence[Mapping[str, Any]], metric: str, limits: Limits
) -> None:
    """Each arm's name and last value on the right, pushed apart, with a faint line to its point."""
    ends: list[tuple[float, float, Look]] = []
    for kind in COMPRESSED:
        ends += [(p.size, p.value, LOOKS[kind]) for p in curve(arms, kind, metric)[-1:]]
    for kind in LEVEL_DASHES:
        height = level(arms, kind, metric)
        ends += [] if height is None else [(limits.names_from, height, LOOKS[kind])]
    step = (limits.y[1] - limits.y[0]) * 0.065
    gap = (limits.x[1] / limits.x[0]) ** 0.02
    for (x, y, look), at in zip(ends, _spread([end[1] for end in ends], step), strict=True):
        leader = {"color": look.colour, "linewidth": 0.8, "alpha": 0.55, "zorder": 1}
        axes.plot((x, limits.names_from, limits.names_from * gap), (y, at, at), **leader)
        name = {"color": look.colour, "va": "center", "fontsize": 9.5, "fontweight": "bold"}
        axes.text(limits.names_from * gap**1.5, at, f"{look.label} {y:.1f}", **name)


def _spread(heights: Sequence[float], step: float) -> list[float]:
    """The heights, moved as little as a pass upward allows so that none is nearer than `step`."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = list(heights)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + step)
    shift = sum(p - h for p, h in zip(placed, heights, strict=True)) / max(len(heights), 1)
    return [height - shift for height in placed]


def _axis_label(metric: str) -> str:
    return "mean IoU (%)" if metric.endswith("miou") else "top-1 accuracy (%)"
