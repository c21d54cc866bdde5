"""Draws the figures of a report from evaluation arms with matplotlib. Writes no file.

An SVG scales with the page, and the style sheet of the page colours its groups. A PNG has a white
background.
"""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipelines.report import marks
from pipelines.report.marks import Arms
from pipelines.settings.arms import ARM_KINDS

WIDTH = 6.4  # inches, or 461 units of the viewBox: on a page of 400 px, text of 11.5 is 9 px high
ROW = 0.26  # inches of one row of the key
RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "figure.labelsize": "medium",
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.alpha": 0.25,
    "grid.color": "black",
}
NAMES = {"classification": "top-1 accuracy", "segmentation": "mean IoU"}
SIZE = "mean wire bytes per image (log scale)"
REQUEST_SIZE = "mean bytes of a reply in a session (log scale)"


def rd_figure(arms: Arms, *, width: float = WIDTH) -> Figure:
    """Draws top-1 or mean IoU in per cent over mean size. The key starts with the highest."""
    metric, sizes = marks.headline(arms), marks.sizes_of(arms)
    ends = {kind: points[-1].value for kind, points in marks.curves(arms, metric, sizes).items()}
    height = 0.62 * width + ROW * (len(ends) + 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    marks.draw_arms(axes, arms, metric, sizes)
    marks.scale_axes(axes, labels=7)
    name = NAMES["segmentation" if metric == "val/miou" else "classification"]
    axes.set(xlabel=_size_label(arms), ylabel=f"{name} (%)")
    key = [
        Line2D(
            [], [], label=f"{marks.label_of(arms, kind)}: {ends[kind]:.1f} %", **marks.stroke(kind)
        )
        for kind in sorted(ends, key=lambda kind: -ends[kind])
    ]
    marks.add_key(figure, key, title=f"{name} at the largest size", alignment="left")
    return figure


def task_figure(arms: Arms, tasks: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws one small panel for each task. All panels have the same axes and one key."""
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    drawn = {kind for task in tasks for kind in marks.curves(arms, task_metric(task))}
    kinds = [kind for kind in ARM_KINDS if kind in drawn]
    height = 1.75 * rows + 0.5 + ROW * (len(kinds) + 1)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    measures = {task["kind"] for task in tasks}
    for axes, task in zip(grid.flat, tasks, strict=False):
        sizes = marks.sizes_of(arms, task["name"])
        marks.draw_arms(axes, arms, task_metric(task), sizes, scale=0.7)
        mixed = len(measures) > 1 and task["kind"] == "segmentation"
        axes.set_title(textwrap.fill(task["name"] + " (mIoU)" * mixed, 18))
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    marks.scale_axes(grid[0, 0], labels=4)
    figure.supxlabel(_size_label(arms))
    label = " or ".join(name for kind, name in NAMES.items() if kind in measures)
    key = [Line2D([], [], label=marks.label_of(arms, kind), **marks.stroke(kind)) for kind in kinds]
    title = f"{label} (%) of each task"
    marks.add_key(figure, key, loc="outside upper left", title=title, alignment="left")
    return figure


def detection_figure(arms: Arms) -> Figure:
    """Draws coverage, the share of true tasks kept, over mean active tasks."""
    figure = Figure(figsize=(WIDTH, 0.62 * WIDTH + 3 * ROW), layout="constrained")
    axes = figure.add_subplot()
    for kind, arm in ranking_arms(arms).items():
        sizes, shares = zip(*arm["detection_curve"], strict=True)
        name = (
            "teacher's own ranking" if kind == "teacher" else f"{ARM_KINDS[kind].label}'s detector"
        )
        look = {**marks.stroke(kind), "marker": "", "label": name}
        axes.plot(sizes, [100 * share for share in shares], **look)
        metrics = arm["metrics"]
        if "val/detection/coverage" in metrics:
            x, y = metrics["val/detection/active_tasks"], 100 * metrics["val/detection/coverage"]
            name = f"as measured: {y:.1f} % with {x:.2f} tasks"
            axes.plot(x, y, **{**marks.stroke(kind), "linestyle": "none", "label": name})
    axes.set_xlim(0.95, min(max(2.0, axes.get_xlim()[1]), 6.1))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set(xlabel="mean active tasks per image", ylabel="coverage: true tasks kept (%)")
    marks.add_key(figure, axes.lines)
    return figure


def ranking_arms(arms: Arms) -> dict[str, Mapping[str, Any]]:
    """Returns the first MANTiS arm and the teacher, if they have a detection curve."""
    ranking = [a for a in reversed(arms) if a["detection_curve"]]
    return {kind: a for kind in ("mantis", "teacher") for a in ranking if a["kind"] == kind}


def task_metric(task: Mapping[str, Any]) -> str:
    """Returns the metric of a task: val/task/<name>/top1 or .../miou."""
    measure = "miou" if task["kind"] == "segmentation" else "top1"
    return f"val/task/{task['name']}/{measure}"


def _size_label(arms: Arms) -> str:
    return REQUEST_SIZE if marks.asks(arms) else SIZE


def styled() -> Any:
    """Returns the matplotlib context in which figures are drawn and saved."""
    return matplotlib.rc_context(RC)


def to_png(figure: Figure) -> bytes:
    """Returns the figure as PNG on white with 160 dots per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> Markup:
    """Returns an <svg> element whose groups have classes. `name` makes its ids unique in a page."""
    for axes in figure.axes:
        for part in (axes.xaxis, axes.yaxis, *axes.spines.values()):
            part.set_gid("ink")
    buffer = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=unsaid)
    text = buffer.getvalue()
    text = re.sub(r'<g id="[\w.]+_\d+"', "<g", text[text.index("<svg") :])  # numbered by matplotlib
    return Markup(text.replace('<g id="', '<g class="'))
