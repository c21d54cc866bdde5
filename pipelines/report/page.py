"""Fills the HTML page of a report with values and figures. The text is in its template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy.stats import binomtest

from pipelines.report import figures
from pipelines.report.chance import chance_sentences
from pipelines.report.marks import HEADLINES, asks, curves, headline, label_of, sizes_of
from pipelines.settings.arms import ARM_KINDS

AGREEMENT = "val/agreement"
TABLE = {  # column -> metric, factor, decimals; the headline's column stands before these
    "wire bytes": ("val/wire_bytes", 1, 1),
    "session bytes": ("val/session_bytes", 1, 1),
    "payload bytes": ("val/payload_bytes", 1, 1),
    "bits / pixel": ("val/bpp", 1, 4),
    "mask exact %": ("val/detection/exact_match", 100, 1),
    "coverage %": ("val/detection/coverage", 100, 1),
    "tasks sent": ("val/detection/active_tasks", 1, 2),
    "client alone %": ("val/client_top1", 100, 1),
    "as the teacher %": (AGREEMENT, 100, 1),
    "client MMAC": ("val/client_macs", 1e-6, 1),
    "client kB": ("val/client_bytes", 1e-3, 0),
}
DASH = "\N{EN DASH}"


def render(template: str, **values: Any) -> str:
    """Returns a template of this folder with all values escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(percent=_percent, signed=_signed)
    return environment.get_template(template).render(arm_kinds=ARM_KINDS, **values)


def report_page(evaluation: Mapping[str, Any], title: str) -> str:
    """Returns the page. Its tables show the first arm of kind `mantis`."""
    arms, tasks = evaluation["arms"], evaluation["tasks"]
    main = next(arm for arm in arms if arm["kind"] == "mantis")
    metrics, kinds = main["metrics"], list(dict.fromkeys(arm["kind"] for arm in arms))
    accuracy = headline(arms)
    sizes = {task["name"]: metrics.get(f"val/task/{task['name']}/wire_bytes") for task in tasks}
    shown = sorted(
        (arm for arm in arms if arm["metrics"]),
        key=lambda arm: (kinds.index(arm["kind"]), arm["metrics"].get("val/wire_bytes", 0.0)),
    )
    return render(
        "report.html.jinja",
        title=title,
        evaluation=evaluation,
        tasks=tasks,
        main=main,
        metrics=metrics,
        kinds=kinds,
        notes=list(dict.fromkeys(filter(None, (ARM_KINDS[kind].note for kind in kinds)))),
        seeds={arm["seed"] for arm in arms if arm["kind"] == "mantis"},
        interval=_interval(evaluation, main),
        chance=_chance(evaluation, accuracy),
        warning=_warning(evaluation),
        accuracy=accuracy,
        accuracy_name=HEADLINES[accuracy],
        curves=curves(arms, accuracy, sizes_of(arms)),
        labels={kind: label_of(arms, kind) for kind in kinds},
        curve_figure=figures.to_svg(figures.rd_figure(arms), "curve"),
        task_figure=figures.to_svg(figures.task_figure(arms, tasks), "tasks"),
        detection_figure=len(tasks) > 1  # one task is always sent
        and figures.ranking_arms(arms)
        and figures.to_svg(figures.detection_figure(arms), "detection"),
        task_metric=figures.task_metric,
        sizes={name: size for name, size in sizes.items() if size is not None},
        requests=_requests(shown, tasks) if asks(arms) else [],
        masks=[task["name"] for task in tasks if task["kind"] == "segmentation"],
        table={f"{HEADLINES[accuracy]} %": (accuracy, 100, 1), **_columns(shown)},
        shown=shown,
    )


def _columns(arms: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, float, int]]:
    """Returns the columns of the table, that of agreement only where an arm has it."""
    agrees = any(AGREEMENT in arm["metrics"] for arm in arms)
    return {name: column for name, column in TABLE.items() if agrees or column[0] != AGREEMENT}


def _requests(
    arms: Sequence[Mapping[str, Any]], tasks: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns what each arm takes for each request in a session, and how it answers that.

    An arm whose images take the same whatever is asked for has the size of those. Mean IoU and
    top-1 have no mean in common.
    """
    rows, alike = [], len({task["kind"] for task in tasks}) == 1
    for arm in arms:
        metrics, name = arm["metrics"], arm["label"]
        whole = metrics.get("val/session_bytes") if ARM_KINDS[arm["kind"]].sends else None
        cells = [
            (
                metrics.get(f"val/task/{task['name']}/session_bytes", whole),
                metrics.get(figures.task_metric(task)),
            )
            for task in tasks
        ]
        columns = zip(*cells, strict=True)
        known = [[value for value in column if value is not None] for column in columns]
        size, value = (fmean(own) if len(own) == len(tasks) else None for own in known)
        means = (size, value if alike else None)
        rows.append({"arm": arm, "label": name, "cells": [means, *cells]})
    return rows


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _chance(evaluation: Mapping[str, Any], accuracy: str) -> str:
    """Returns the chance of top-1 as text, empty where it is unknown."""
    value = evaluation.get("chance")
    return "" if value is None or accuracy != "val/top1" else f"; chance is {_percent(value)} %"


def _warning(evaluation: Mapping[str, Any]) -> str:
    """Returns the sentences that a page of a codec at chance opens with, empty for a better one."""
    sentences = chance_sentences(evaluation)[1:]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in sentences)


def _interval(evaluation: Mapping[str, Any], main: Mapping[str, Any]) -> str:
    """Returns the 95 % interval of top-1 as text.

    It is empty for images with several labels: their pairs are not independent samples.
    """
    rows, top1 = evaluation["rows"], main["metrics"].get("val/top1")
    if not evaluation["single_class"] or not rows or top1 is None:
        return ""
    found = binomtest(round(top1 * rows), rows).proportion_ci(method="wilson")
    return f" (95\N{NO-BREAK SPACE}% interval {_percent(found.low)} to {_percent(found.high)})"
