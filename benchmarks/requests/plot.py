"""Draws the curves of the study: accuracy over the bytes of a reply, a panel for each cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.report import marks
from pipelines.report.figures import REQUEST_SIZE, ROW, styled, to_png
from pipelines.settings.arms import ARM_KINDS

NARROWEST = 6.4  # inches, for the key


def plot(cells: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Returns a PNG of the cells' points, means over seeds and requests."""
    columns = min(3, len(cells))
    rows = -(-len(cells) // columns)
    drawn = {point["kind"] for cell in cells.values() for point in cell["points"]}
    kinds = [kind for kind in ARM_KINDS if kind in drawn]
    with styled():
        size = (max(NARROWEST, 3.2 * columns + 0.4), 2.6 * rows + ROW * (len(kinds) / 2 + 1) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(cells) :]:
            axes.set_visible(False)
        for axes, (name, cell) in zip(grid.flat, cells.items(), strict=False):
            arms = [
                {
                    **point,
                    "metrics": {
                        "val/top1": point["accuracy"],
                        **(
                            {"val/session_bytes": point["session_bytes"]}
                            if point["session_bytes"] is not None
                            else {}
                        ),
                    },
                }
                for point in cell["points"]
                if point["accuracy"] is not None
            ]
            marks.draw_arms(axes, arms, "val/top1", ("val/session_bytes",), scale=0.8)
            marks.scale_axes(axes, labels=4)
            axes.set_title(name)
            axes.set_xlabel(REQUEST_SIZE)
        for axes in grid[:, 0]:
            axes.set_ylabel("mean accuracy (%)")
        key = [
            Line2D([], [], label=ARM_KINDS[kind].label_for("asked"), **marks.stroke(kind))
            for kind in kinds
        ]
        marks.add_key(figure, key, ncols=2)
        return to_png(figure)
