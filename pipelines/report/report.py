"""Writes the report of one evaluation: points as CSV and JSON, a PNG and one HTML page.

mantis report latest
"""

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.report.figures import rd_figure, styled, to_png
from pipelines.report.marks import Arms
from pipelines.report.page import report_page

IDENTITY = (
    "name",
    "label",
    "kind",
    "rate_weight",
    "level",
    "quality",
    "scale",
    "seed",
    "stage_key",
)
ABOUT = ("split", "rows", "image_size", "tasks", "single_class", "chance")


class ReportError(ValueError):
    """Raised if an evaluation has no arm to report."""

    exit_code = 2


@dataclass(frozen=True)
class ReportPaths:
    """The files of one report."""

    csv: Path
    json: Path
    png: Path
    html: Path


def write_report(
    evaluation: Mapping[str, Any], folder: str | Path, *, title: str = "MANTiS report"
) -> ReportPaths:
    """Writes rd_points.csv, rd_points.json, rd_curve.png and report.html into `folder`.

    `evaluation` is the content of evaluation.json. Raises ReportError without a main arm.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("rd_points.csv", "rd_points.json", "rd_curve.png", "report.html")
    paths = ReportPaths(*(folder / name for name in names))
    arms = [  # a figure that is not finite is left out, as if it were not measured
        {**arm, "metrics": {k: v for k, v in arm["metrics"].items() if math.isfinite(v)}}
        for arm in evaluation["arms"]
    ]
    evaluation = {**evaluation, "arms": arms}
    if not any(arm["kind"] == "mantis" for arm in arms):
        raise ReportError(
            "the evaluation has no arm of kind 'mantis'. Run `mantis evaluate` first."
        )
    paths.csv.write_text(_points_csv(arms), "utf-8")
    paths.json.write_text(_points_json(evaluation), "utf-8")
    with styled():
        paths.png.write_bytes(to_png(rd_figure(arms)))
        paths.html.write_text(report_page(evaluation, title), "utf-8")
    return paths


def _points_csv(arms: Arms) -> str:
    names = sorted({name for arm in arms for name in arm["metrics"]})
    buffer = io.StringIO()
    columns = [*IDENTITY, *names]
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**arm, **arm["metrics"]} for arm in arms)
    return buffer.getvalue()


def _points_json(evaluation: Mapping[str, Any]) -> str:
    points = [
        {name: arm.get(name) for name in (*IDENTITY, "metrics")} for arm in evaluation["arms"]
    ]
    content = {**{name: evaluation.get(name) for name in ABOUT}, "points": points}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
