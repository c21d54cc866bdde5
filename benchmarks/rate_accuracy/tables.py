"""Prints the points of a study as tables on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.settings.arms import ARM_KINDS


def show_points(points: Sequence[Mapping[str, Any]]) -> None:
    """Prints the points by kind and size. Accuracies are in per cent, sizes in bytes.

    "client" is the top1 that the client has alone, MMAC and kB are what its networks cost.
    """
    shown = Table()
    for column in ("arm", "rate weight", "quality", "scale", "seeds"):
        shown.add_column(column, no_wrap=True)
    for column in (
        "top1",
        "std",
        "wire",
        "session",
        "payload",
        "coverage",
        "active",
        "client",
        "MMAC",
        "kB",
        "floor",
        "x floor",
    ):
        shown.add_column(column, justify="right", no_wrap=True)

    def cell(point: Mapping[str, Any], name: str, factor: float, digits: int) -> str:
        value = point.get(name)
        return "" if value is None else f"{factor * value:.{digits}f}"

    for point in sorted(points, key=lambda each: (each["kind"], each.get("wire_bytes", 0))):
        rate, quality = point["rate_weight"], point["quality"]
        shown.add_row(
            ARM_KINDS[point["kind"]].label,
            "" if rate is None else f"{rate:g}",
            "" if quality is None else str(quality),
            "" if point["scale"] is None else f"{point['scale']:g}",
            " ".join(map(str, point["seeds"])),
            cell(point, "top1", 100, 2),
            cell(point, "top1_std", 100, 2),
            cell(point, "wire_bytes", 1, 1),
            cell(point, "session_bytes", 1, 1),
            cell(point, "payload_bytes", 1, 1),
            cell(point, "coverage", 100, 1),
            cell(point, "active_tasks", 1, 2),
            cell(point, "client_top1", 100, 1),
            cell(point, "client_macs", 1e-6, 1),
            cell(point, "client_bytes", 1e-3, 0),
            cell(point, "floor_bits", 1, 2),
            cell(point, "payload_over_floor", 1, 0),
        )
    _print(shown)


def show_factors(smaller: Sequence[Mapping[str, Any]]) -> None:
    """Prints the size of each image codec relative to MANTiS at the same top1."""
    codecs = sorted({codec for point in smaller for codec in point["wire_factor"]})
    if not codecs:
        return
    shown = Table(
        "arm",
        "rate weight",
        title="bytes of image codecs divided by MANTiS's at the same top1: wire, payload",
    )
    for column in ("top1", "wire", "payload", *codecs):
        shown.add_column(column, justify="right", no_wrap=True)
    for point in sorted(smaller, key=lambda each: (each["kind"], each["wire_bytes"])):
        pairs = [(point["wire_factor"][codec], point["payload_factor"][codec]) for codec in codecs]
        shown.add_row(
            ARM_KINDS[point["kind"]].label,
            f"{point['rate_weight']:g}",
            f"{100 * point['top1']:.2f}",
            f"{point['wire_bytes']:.1f}",
            f"{point['payload_bytes']:.1f}",
            *(", ".join("-" if x is None else f"{x:.1f}x" for x in pair) for pair in pairs),
        )
    _print(shown)


def show_intervals(title: str, figures: Sequence[Mapping[str, Any]]) -> None:
    """Prints BD figures as `bd_figures` returns them, those of a question together."""
    measured = [found for found in figures if "refused" not in found]
    if not measured:
        return
    shown = Table("arm", "against", title=title)
    for column in ("mean", "95 % over images and seeds", "95 % over seeds (t)", "seeds"):
        shown.add_column(column, justify="right", no_wrap=True)
    for question, together in groupby(measured, key=lambda found: found["question"]):
        shown.add_section()
        shown.add_row(f"[bold]{question}")
        for found in together:
            few = found["t_low"] is None
            shown.add_row(
                ARM_KINDS[found["test"]].label,
                ARM_KINDS[found["against"]].label,
                f"{found['mean']:+.1f}",
                f"{found['low']:+.1f} to {found['high']:+.1f}",
                "one seed" if few else f"{found['t_low']:+.1f} to {found['t_high']:+.1f}",
                str(len(found["seeds"])),
            )
    _print(shown)


def _print(shown: Table) -> None:
    console = Console(stderr=True)
    (console if console.is_terminal else Console(stderr=True, width=140)).print(shown)
