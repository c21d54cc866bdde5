"""Writes the report of a search as CSV, JSON, PNG and HTML. Measures nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.report.figures import WIDTH, styled, to_png, to_svg
from pipelines.report.marks import add_key, log_ticks, stroke
from pipelines.report.page import render
from pipelines.search.journal import TrialRecord, finished_points
from pipelines.search.points import RdPoint, hypervolume, pareto_front
from pipelines.search.sampler import importances

if TYPE_CHECKING:
    from pipelines.search.result import SearchResult
    from tune_spaces.domains import Space

Part = tuple[Callable[..., None], Any]
PLAIN = ("trial", "level", "state", "epochs", "wire_bytes", "top1", "on_front", "reason", "run_id")


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
    """Writes front.csv, trials.csv, search.json, search.png and search.html into `folder`.

    Field importances are computed from the points after `epoch`, which every trial has reached.
    """
    front = {(point.trial, point.level) for point in result.front}
    rows = [
        _row(record, point, point is not None and (record.number, point.level) in front)
        for record in trials.values()
        for point in record.points or (None,)
    ]
    keys = list(space)
    (folder / "trials.csv").write_text(_csv(rows, keys), "utf-8")
    on_front = sorted((row for row in rows if row["on_front"]), key=lambda row: row["wire_bytes"])
    (folder / "front.csv").write_text(_csv(on_front, keys), "utf-8")
    progress = hypervolume_over_time(trials, reference)
    matter = importances(space, trials.values(), reference, epoch=epoch)
    places = ("root", "folder")  # left out: paths of this machine may contain a user name
    content = {
        **{name: value for name, value in asdict(result).items() if name not in places},
        "reference": asdict(reference),
        "hypervolume_over_time": progress,
        "importance": matter,
        "importance_epoch": epoch,
    }
    (folder / "search.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    with styled():
        parts: list[Part] = [(_draw_points, trials), (_draw_progress, progress)]
        (folder / "search.png").write_bytes(to_png(_figure(*parts)))
        names = ("Points of all trials and the front", "Hypervolume over trained epochs")
        figures = {n: to_svg(_figure(part), n) for n, part in zip(names, parts, strict=True)}
    page = render(
        "search.html.jinja",
        title=title,
        result=result,
        figures=figures,
        keys=keys,
        levels=any(row["level"] != "" for row in rows),
        rows=sorted(rows, key=lambda row: (not row["on_front"], row["wire_bytes"] or 1e12)),
        matter=matter,
        epoch=epoch,
    )
    (folder / "search.html").write_text(page, "utf-8")


def hypervolume_over_time(
    trials: Mapping[int, TrialRecord], reference: RdPoint
) -> list[dict[str, float]]:
    """Returns one row per ended trial: seconds since the search began, epochs and hypervolume.

    Epochs are counted over all trials that ended so far.
    """
    ended = sorted((r for r in trials.values() if r.ended is not None), key=lambda r: r.ended or 0)
    began = min((record.began for record in trials.values()), default=0.0)
    points: list[RdPoint] = []
    epochs, rows = 0, []
    for record in ended:
        epochs += len(record.epochs)
        if record.state == "finished":
            points.extend(record.points)
        rows.append(
            {
                "trial": record.number,
                "seconds": round((record.ended or 0.0) - began, 1),
                "epochs": epochs,
                "hypervolume": round(hypervolume(points, reference), 6),
            }
        )
    return rows


def _figure(*parts: Part) -> Figure:
    """Draws panels side by side. A part is a drawing function and its data."""
    figure = Figure(figsize=(len(parts) * WIDTH, 0.75 * WIDTH), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)
    for axes, (draw, what) in zip(panels.flat, parts, strict=True):
        draw(axes, what)
    return figure


def _draw_points(axes: Axes, trials: Mapping[int, TrialRecord]) -> None:
    points = finished_points(trials)
    cut = [point for r in trials.values() if r.state == "stopped" for point in r.points]
    front = [points[key] for key in pareto_front(points)]
    plain = {**stroke("teacher"), "linestyle": "none", "markersize": 5}
    axes.plot(*_axes(cut), **{**plain, "marker": "x", "label": "stopped early"})
    axes.plot(*_axes(list(points.values())), **{**plain, "marker": "o", "label": "finished"})
    axes.plot(*_axes(front), **stroke("mantis"), label="Pareto front")
    axes.set(xscale="log", xlabel="wire bytes per image, estimated (log scale)")
    axes.set_ylabel("top-1 accuracy on holdout rows (%)")
    log_ticks(axes, labels=7)
    add_key(axes, axes.lines, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _draw_progress(axes: Axes, progress: Sequence[Mapping[str, float]]) -> None:
    epochs, volumes = ([row[name] for row in progress] for name in ("epochs", "hypervolume"))
    axes.step(epochs, volumes, where="post", **{**stroke("mantis"), "markersize": 4})
    axes.set(xlabel="stage 2 epochs over all trials", ylabel="hypervolume")


def _axes(points: Sequence[RdPoint]) -> tuple[list[float], list[float]]:
    return [point.wire_bytes for point in points], [100 * point.top1 for point in points]


def _row(record: TrialRecord, point: RdPoint | None, on_front: bool) -> dict[str, Any]:
    """A line of a trial: each of its points has one, and a trial without a point has one."""
    return {
        "trial": record.number,
        "level": "" if point is None or point.level is None else point.level,
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
