"""The files of a search: front and trials as CSV and JSON, a PNG, a page. Measures nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from pipelines.report_figures import LOOKS, styled, to_png, to_svg
from pipelines.search_journal import TrialRecord, finished_points
from pipelines.search_points import RdPoint, hypervolume, pareto_front
from pipelines.search_sampler import importances

if TYPE_CHECKING:
    from pipelines.search import SearchResult
    from tune_spaces.domains import Space

FRONT, OTHER = LOOKS["mantis"].colour, LOOKS["teacher"].colour
GRID: dict[str, Any] = {"color": "#888888", "alpha": 0.25, "linewidth": 0.7}
NARROW = 8  # times the fewest bytes
PLAIN = ("trial", "state", "epochs", "wire_bytes", "top1", "on_front", "reason", "run_id")


def write_search_report(
    folder: Path,
    result: SearchResult,
    trials: Mapping[int, TrialRecord],
    space: Space,
    *,
    reference: RdPoint,
    epoch: int,
    title: str,
) -> None:
    """Writes front.csv, trials.csv, search.json, search.png and search.html into a folder.

    `epoch` is the one whose points tell which fields matter: all trials have it.
    """
    front = {point.trial for point in result.front}
    rows = [_row(record, record.number in front) for record in trials.values()]
    keys = list(space)
    (folder / "trials.csv").write_text(_csv(rows, keys), "utf-8")
    on_front = sorted((row for row in rows if row["on_front"]), key=lambda row: row["wire_bytes"])
    (folder / "front.csv").write_text(_csv(on_front, keys), "utf-8")
    progress = hypervolume_over_time(trials, reference)
    matter = importances(space, trials.values(), epoch=epoch)
    places = ("root", "folder")  # paths of this machine, which may name its user
    content = {
        **{name: value for name, value in asdict(result).items() if name not in places},
        "reference": asdict(reference),
        "hypervolume_over_time": progress,
        "importance": matter,
        "importance_epoch": epoch,
    }
    (folder / "search.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    with styled():
        (folder / "search.png").write_bytes(to_png(search_figure(trials, progress, width=9.2)))
        figures = [
            to_svg(_alone(_draw_points, trials), "points"),
            to_svg(_alone(_draw_progress, progress), "progress"),
        ]
        page = _page(title, result, rows, keys, matter, epoch, figures)
        (folder / "search.html").write_text(page, "utf-8")


def hypervolume_over_time(
    trials: Mapping[int, TrialRecord], reference: RdPoint
) -> list[dict[str, float]]:
    """After each ended trial: seconds since the search began, epochs trained, hypervolume."""
    ended = sorted((r for r in trials.values() if r.ended is not None), key=lambda r: r.ended or 0)
    began = min((record.began for record in trials.values()), default=0.0)
    points: list[RdPoint] = []
    epochs, rows = 0, []
    for record in ended:
        epochs += len(record.epochs)
        if record.state == "finished" and record.point is not None:
            points.append(record.point)
        rows.append(
            {
                "trial": record.number,
                "seconds": round((record.ended or 0.0) - began, 1),
                "epochs": epochs,
                "hypervolume": round(hypervolume(points, reference), 6),
            }
        )
    return rows


def search_figure(
    trials: Mapping[int, TrialRecord], progress: Sequence[Mapping[str, float]], *, width: float
) -> Figure:
    """Left all points with the front, right the hypervolume over trained epochs."""
    figure = Figure(figsize=(width, width * 0.42), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_points(left, trials)
    _draw_progress(right, progress)
    return figure


def _alone(draw: Callable[..., None], what: Any) -> Figure:
    """One of the two as a figure of its own, which a page sets beside or below the other."""
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    draw(figure.subplots(), what)
    return figure


def _draw_points(axes: Axes, trials: Mapping[int, TrialRecord]) -> None:
    points = finished_points(trials)
    cut = [r.point for r in trials.values() if r.point and r.state == "stopped"]
    front = [points[number] for number in pareto_front(points)]
    plain: dict[str, Any] = {"linestyle": "none", "color": OTHER}
    axes.plot(*_axes(cut), marker="x", markersize=5, label="stopped early", **plain)
    axes.plot(*_axes(list(points.values())), marker="o", markersize=5, label="finished", **plain)
    axes.plot(*_axes(front), color=FRONT, marker="o", markersize=7, label="Pareto front")
    axes.set(xscale="log", xlabel="wire bytes per image, estimated (log scale)")
    low, high = axes.get_xlim()
    narrow = high < NARROW * low  # too few powers of ten and their doubles would lie in it
    axes.xaxis.set_major_locator(MaxNLocator(5) if narrow else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("top-1 accuracy on held-back rows (%)")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.grid(**GRID)


def _draw_progress(axes: Axes, progress: Sequence[Mapping[str, float]]) -> None:
    axes.step(
        [row["epochs"] for row in progress],
        [row["hypervolume"] for row in progress],
        where="post",
        color=FRONT,
        marker="o",
        markersize=4,
    )
    axes.set(xlabel="epochs of stage 2 trained, all trials", ylabel="hypervolume")
    axes.grid(**GRID)


def _axes(points: Sequence[RdPoint]) -> tuple[list[float], list[float]]:
    return [point.wire_bytes for point in points], [100 * point.top1 for point in points]


def _row(record: TrialRecord, on_front: bool) -> dict[str, Any]:
    point = record.point
    return {
        "trial": record.number,
        "state": record.state,
        "epochs": len(record.epochs),
        "wire_bytes": "" if point is None else round(point.wire_bytes, 3),
        "top1": "" if point is None else round(point.top1, 5),
        "on_front": on_front,
        "reason": record.reason,
        "run_id": record.run_id or "",
        **record.params,
    }


def _csv(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*PLAIN, *keys], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _page(
    title: str,
    result: SearchResult,
    rows: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    matter: Mapping[str, Mapping[str, float]],
    epoch: int,
    figures: Sequence[str],
) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    order = sorted(rows, key=lambda row: (not row["on_front"], row["wire_bytes"] or 1e12))
    return environment.get_template("search.html.jinja").render(
        title=title,
        result=result,
        figures=[Markup(figure) for figure in figures],
        colours={"mantis": FRONT, "teacher": OTHER},
        keys=keys,
        rows=[{**row, "values": [_text(row.get(key, "")) for key in keys]} for row in order],
        matter=[
            {
                "key": key,
                "shares": [f"{100 * shares.get(key, 0.0):.0f}" for shares in matter.values()],
            }
            for key in keys
        ],
        objectives=list(matter),
        epoch=epoch,
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
