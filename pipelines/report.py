"""A report from one evaluation: points as CSV and JSON, a PNG, one HTML page; measures nothing.

mantis report latest
"""

import base64
import binascii
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mantis_core.image_codecs import IMAGE_CODECS
from pipelines.report_figures import (
    COMPRESSED,
    LOOKS,
    curve,
    detection_figure,
    level,
    ranking_arms,
    rd_figure,
    styled,
    task_figure,
    task_metric,
    to_png,
    to_svg,
)

IDENTITY = ("name", "label", "kind", "rate_weight", "quality", "seed", "stage_key")
TABLE = {  # column -> metric, factor, decimals
    "top-1 %": ("val/top1", 100, 1),
    "wire bytes": ("val/wire_bytes", 1, 1),
    "payload bytes": ("val/payload_bytes", 1, 1),
    "bits / pixel": ("val/bpp", 1, 4),
    "mask exact %": ("val/detection/exact_match", 100, 1),
    "coverage %": ("val/detection/coverage", 100, 1),
    "tasks sent": ("val/detection/active_tasks", 1, 2),
}
WIDE, NARROW = 9.2, 3.9  # inches; an SVG is scaled to its card, and text should stay 10 px or more
MAX_EXAMPLES = 24
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


class ReportError(ValueError):
    """An evaluation that cannot be reported; the message says why."""

    exit_code = 2


@dataclass(frozen=True)
class ReportPaths:
    csv: Path
    json: Path
    png: Path
    html: Path


def write_report(
    evaluation: Mapping[str, Any], folder: str | Path, *, title: str = "MANTiS report"
) -> ReportPaths:
    """Write rd_points.csv, rd_points.json, rd_curve.png and report.html into `folder`.

    `evaluation` is the content of evaluation.json. Raises ReportError without a main arm.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = _finite_metrics(evaluation)
    arms = evaluation["arms"]
    if not any(arm["kind"] == "mantis" for arm in arms):
        raise ReportError("the evaluation has no arm of kind 'mantis'; evaluate stage2 first")
    paths = ReportPaths(
        folder / "rd_points.csv",
        folder / "rd_points.json",
        folder / "rd_curve.png",
        folder / "report.html",
    )
    paths.csv.write_text(_points_csv(arms), "utf-8")
    paths.json.write_text(_points_json(evaluation), "utf-8")
    with styled():
        paths.png.write_bytes(to_png(rd_figure(arms, width=WIDE)))
        paths.html.write_text(_page(evaluation, title), "utf-8")
    return paths


def _points_csv(arms: Sequence[Mapping[str, Any]]) -> str:
    names = sorted({name for arm in arms for name in arm["metrics"]})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*IDENTITY, *names])
    for arm in arms:
        writer.writerow(
            [arm[field] for field in IDENTITY] + [arm["metrics"].get(name, "") for name in names]
        )
    return buffer.getvalue()


def _points_json(evaluation: Mapping[str, Any]) -> str:
    keep = ("split", "rows", "image_size", "tasks", "single_class")
    points = [
        {**{field: arm[field] for field in IDENTITY}, "metrics": arm["metrics"]}
        for arm in evaluation["arms"]
    ]
    content = {**{field: evaluation[field] for field in keep}, "points": points}
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _page(evaluation: Mapping[str, Any], title: str) -> str:
    arms, tasks = evaluation["arms"], evaluation["tasks"]
    main = next(arm for arm in arms if arm["kind"] == "mantis")
    height, width = evaluation["image_size"]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    columns = list(TABLE)
    kinds = list(dict.fromkeys(arm["kind"] for arm in arms))
    shown = sorted(
        (arm for arm in arms if arm["metrics"]),
        key=lambda arm: (kinds.index(arm["kind"]), arm["metrics"].get("val/wire_bytes", 0.0)),
    )
    return environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=(
            f"{len(tasks)} tasks, {evaluation['rows']:,} images of {width} {TIMES} {height} "
            f"pixels, split '{evaluation['split']}', every one coded to a real bitstream and "
            "decoded"
        ),
        facts=_facts(evaluation, main),
        curve_text=_curve_text(arms),
        curve_alt=_curve_alt(arms),
        curve_wide=Markup(to_svg(rd_figure(arms, width=WIDE), "rd-wide")),
        curve_narrow=Markup(to_svg(rd_figure(arms, width=NARROW), "rd-narrow")),
        looks=LOOKS,
        columns=["arm", *columns[:2], "rate weight", "seed", *columns[2:]],
        rows=[_table_row(arm, main) for arm in shown],
        image_ratio=f"{width} / {height}",
        tasks_wide=Markup(to_svg(task_figure(arms, tasks, width=WIDE), "tasks-wide")),
        tasks_narrow=Markup(to_svg(task_figure(arms, tasks, width=NARROW), "tasks-narrow")),
        tasks=[_task_row(task, main) for task in tasks],
        sizes=_task_sizes(tasks, main),
        measured=_measured(main),
        confusion=_confusion(main, tasks),
        detection=[
            Markup(to_svg(detection_figure(arms, width=size), name))
            for size, name in ((WIDE, "detection-wide"), (NARROW, "detection-narrow"))
            if ranking_arms(arms)
        ],
        examples=[_example(e, tasks) for e in evaluation["examples"][:MAX_EXAMPLES]],
        notes=_notes(evaluation, main),
    )


def _facts(evaluation: Mapping[str, Any], main: Mapping[str, Any]) -> list[dict[str, str]]:
    metrics = main["metrics"]
    height, width = evaluation["image_size"]
    facts = []

    def add(value: str, unit: str, meaning: str) -> None:
        facts.append({"value": value, "unit": unit, "meaning": meaning})

    if "val/top1" in metrics:
        add(
            f"{100 * metrics['val/top1']:.1f}",
            "%",
            f"top-1, end to end{_interval(evaluation, main)}",
        )
    if "val/wire_bytes" in metrics:
        size = metrics["val/wire_bytes"]
        add(f"{size:.0f}", "bytes", "per image on the wire, everything counted")
        add(f"{3 * height * width / size:,.0f}", TIMES, "smaller than the raw pixels (8-bit RGB)")
    if "val/bpp" in metrics:
        add(f"{metrics['val/bpp']:.3f}", "bit", "per pixel of the input image")
    teacher = level(evaluation["arms"], "teacher", "val/top1")
    if teacher is not None and "val/top1" in metrics:
        difference = 100 * metrics["val/top1"] - teacher
        add(_signed(difference), "points", "against the uncompressed teacher")
    if "val/detection/exact_match" in metrics:
        exact = 100 * metrics["val/detection/exact_match"]
        add(f"{exact:.1f}", "%", "of images with exactly the right tasks detected")
    return facts


def _interval(evaluation: Mapping[str, Any], main: Mapping[str, Any]) -> str:
    """Wilson's 95 % interval for a share of N images; pairs of a multi-label set are no sample."""
    n = evaluation["rows"]
    if not evaluation["single_class"] or n == 0:
        return ""
    p, z = main["metrics"]["val/top1"], 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return f" (95 % interval {100 * (centre - half):.1f} to {100 * (centre + half):.1f})"


def _curve_text(arms: Sequence[Mapping[str, Any]]) -> str:
    points = curve(arms, "mantis", "val/top1")
    text = "Up and to the left is better."
    if any(level(arms, kind, "val/top1") is not None for kind in ("individual", "teacher")):
        text += " A horizontal line is a model without compression: it has no size."
    if len(points) == 1:
        text += (
            " One rate was trained: this is a point, not a curve. More rates: "
            "evaluate.rate_weights."
        )
    return text


def _curve_alt(arms: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for kind in COMPRESSED:
        points = curve(arms, kind, "val/top1")
        described = ", ".join(f"{p.value:.1f} % at {p.size:.0f} bytes" for p in points)
        parts += [f"{LOOKS[kind].label}: {described}"] if points else []
    for kind in ("individual", "teacher"):
        height = level(arms, kind, "val/top1")
        parts += (
            [f"{LOOKS[kind].label}, uncompressed: {height:.1f} %"] if height is not None else []
        )
    return "Top-1 accuracy over mean wire bytes. " + "; ".join(parts)


def _table_row(arm: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, Any]:
    rate = DASH if arm["rate_weight"] is None else f"{arm['rate_weight']:g}"
    if arm["quality"] is not None:
        rate = f"quality {arm['quality']}"
    figures = [
        f"{factor * arm['metrics'][metric]:,.{decimals}f}" if metric in arm["metrics"] else DASH
        for metric, factor, decimals in TABLE.values()
    ]
    return {
        "label": arm["label"],
        "kind": arm["kind"],
        "main": arm is main,
        "cells": [*figures[:2], rate, str(arm["seed"]), *figures[2:]],
    }


def _task_row(task: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, str]:
    def percent(metric: str) -> str:
        value = main["metrics"].get(metric)
        return DASH if value is None else f"{100 * value:.1f}"

    measure = " (mean IoU)" if task["kind"] == "segmentation" else ""
    return {
        "name": task["name"] + measure,
        "labels": str(len(task["labels"])),
        "accuracy": percent(task_metric(task)),
        "decoded": percent(f"val/task/{task['name']}/decoded"),
    }


def _task_sizes(
    tasks: Sequence[Mapping[str, Any]], main: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Mean size of the images of each task, and its share of the largest for a bar."""
    found = [(t["name"], main["metrics"].get(f"val/task/{t['name']}/wire_bytes")) for t in tasks]
    sizes = [(name, size) for name, size in found if size is not None]
    most = max((size for _, size in sizes), default=0.0) or 1.0
    return [
        {"name": n, "share": f"{x / most:.3f}", "bits": f"{8 * x:,.0f}", "bytes": f"{x:,.1f}"}
        for n, x in sizes
    ]


def _measured(arm: Mapping[str, Any]) -> str:
    """Which of the points a table of one arm is about."""
    size = arm["metrics"].get("val/wire_bytes")
    weight = "" if arm["rate_weight"] is None else f" at rate weight {arm['rate_weight']:g}"
    return f"{arm['label']}{weight}" + ("" if size is None else f", {size:,.1f} bytes per image")


def _confusion(
    main: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    counts = main["detector_confusion"]
    if not counts:
        return None
    names = [task["name"] for task in tasks]
    rows = [
        {"name": name, "count": int(sum(row)), "shares": [n / max(sum(row), 1) for n in row]}
        for name, row in zip(names, counts, strict=True)
    ]
    return {"names": names, "rows": rows, "images": f"{sum(row['count'] for row in rows):,}"}


def _example(example: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was true and what was said, task by task; a task in neither is not mentioned."""
    true, said = example["true"], example["answer"]
    masks = {task["name"] for task in tasks if task["kind"] == "segmentation"}
    lines = []
    for task in [*true, *(name for name in said if name not in true)]:
        right = task in said and said[task] == true.get(task)
        answer = "mask decoded" if task in masks and task in said else said.get(task, "not sent")
        lines.append(
            {
                "task": task,
                "said": answer,
                "truth": "" if right else true.get(task, "not in the image"),
                "state": "right" if right else "wrong",
                "mark": "\N{CHECK MARK}" if right else "\N{MULTIPLICATION X}",
            }
        )
    try:
        base64.b64decode(example["jpeg_base64"], validate=True)
    except binascii.Error as error:
        raise ReportError(f"an example's image is no base64: {error}") from error
    return {
        "jpeg": example["jpeg_base64"],
        "bytes": example["wire_bytes"],
        "lines": lines,
        "joint": example["class"] if len(said) > 1 else None,
        "alt": ", ".join(f"{task}: {label}" for task, label in true.items()) or "no task",
    }


def _notes(evaluation: Mapping[str, Any], main: Mapping[str, Any]) -> list[str]:
    metrics, arms = main["metrics"], evaluation["arms"]
    notes = [
        "Top-1 is end to end: through detection, entropy coding, decoding and the joint decision. "
        + (
            "A class whose task was not decoded counts as wrong."
            if evaluation["single_class"]
            else "Images have several labels, so it is the share of (image, true task) pairs that "
            "were decoded and right; a pair not decoded counts as wrong."
        ),
        "Wire bytes are the length of real streams: header, task field, payload and checksum. "
        "Bits per pixel are those bits over the pixels of the input image.",
    ]
    if {"val/estimated_bytes", "val/payload_bytes"} <= metrics.keys():
        off = metrics["val/payload_bytes"] - metrics["val/estimated_bytes"]
        notes.append(
            f"The entropy model estimates {metrics['val/estimated_bytes']:.1f} payload bytes per "
            f"image; the coder writes {metrics['val/payload_bytes']:.1f} ({_signed(off)})."
        )
    seeds = {arm["seed"] for arm in arms if arm["kind"] == "mantis"}
    notes.append(
        f"{len(seeds)} seeds; lines are means, faint marks single seeds."
        if len(seeds) > 1
        else "One seed. A difference between arms may be the luck of one training run; the "
        "interval of the main figure is that of the images alone."
    )
    kinds = {arm["kind"] for arm in arms}
    missing = [look.label for kind, look in LOOKS.items() if kind not in kinds]
    if missing:
        notes.append(f"Not measured here: {', '.join(missing)}.")
    if "oracle" in kinds:
        notes.append("Oracle tasks: the same model, told which tasks are in the image.")
    if "none" in kinds:
        notes.append(
            "No conditioning: the same architecture and schedule without FiLM and with one prior."
        )
    if "student" in kinds:
        notes.append(
            "Entropic student: the same client and schedule with one task of all classes, so "
            "nothing is detected and no task sent."
        )
    if "per_task" in kinds:
        notes.append(
            "Individual codecs: one a task, trained on its images alone and told the task; an "
            "image of several tasks is sent once for each."
        )
    if kinds & {f"{codec}_tuned" for codec in IMAGE_CODECS}:
        notes.append(
            "Tuned teachers: the teacher trained on after its codec's decoded images, of all the "
            "qualities shown."
        )
    if kinds & IMAGE_CODECS.keys():
        notes.append(
            "Image codecs: whole files as Pillow writes them, in front of the uncompressed "
            "teacher; payload bytes leave out container headers."
        )
    return notes


def _finite_metrics(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A figure that is not a finite number is treated as absent, like one never measured."""
    arms = [
        {
            "quality": None,  # not there in evaluations of before image codecs
            **arm,
            "metrics": {k: v for k, v in arm["metrics"].items() if math.isfinite(v)},
        }
        for arm in evaluation["arms"]
    ]
    return {**evaluation, "arms": arms}


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")
