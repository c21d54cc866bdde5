"""Writes what a person reads about a run or a registered model in MLflow. Asks no server."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from pipelines.versions import DISTRIBUTION

if TYPE_CHECKING:
    from mlflow.entities import Dataset

ROLES = {
    "whole": "encodes images and answers from their streams, client and server in one process",
    "client": "encodes images to streams on a device; it holds no weights of the server",
    "server": "answers from streams; it holds no weights of the client and sees no image",
}
INPUTS = {"whole": "image", "client": "image", "server": "stream"}
FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "val/top1": ("top-1 accuracy, from end to end", lambda value: f"{100 * value:.1f} %"),
    "val/miou": ("mean IoU", lambda value: f"{100 * value:.1f} %"),
    "val/wire_bytes": ("bytes an image on the link", lambda value: f"{value:.1f}"),
    "val/bpp": ("bits per pixel", lambda value: f"{value:.4g}"),
}
"""The figures of a description: how they are called and written."""
# MLflow stores 5,000 characters of a version's description and 8,000 of a run's.
MAX_TASKS, MAX_LABELS, MAX_ARMS, MAX_NAME = 10, 4, 12, 40


def model_description(part: str, name: str) -> str:
    """Returns the description of a registered model, which all its versions share."""
    return (
        f"A MANTiS codec: it {ROLES[part]}. "
        "The newest version has the alias `candidate`; `mantis promote VERSION` gives one the "
        f"alias `champion`. `mantis models` lists the versions of `{name}` with their figures."
    )


def run_description(evaluation: Mapping[str, Any], dataset: Dataset) -> str:
    """Returns the description of a pipeline's run: the figures of its arms, the main one first."""
    return f"**Figures** {_measured(evaluation, dataset)}\n\n{_table(evaluation['arms'])}\n"


def version_description(
    part: str,
    model: str,
    tags: Mapping[str, str],
    evaluation: Mapping[str, Any],
    dataset: Dataset | None,
) -> str:
    """Returns the description of a version: tasks, figures, data, and how to load it.

    `model` is the version as `models:/<name>/<version>`. `tags` are those of the version.
    `evaluation` is the content of evaluation.json. `dataset` is its evaluation split, None where
    the prepared data is gone.
    """
    arms = evaluation["arms"]
    main = main_arm(evaluation, tags["mantis.stage_key"])
    others = [arm for arm in arms if arm is not main]
    parts = [
        f"This model {ROLES[part]}.",
        f"**Tasks**\n\n{_tasks(evaluation['tasks'])}",
        f"**Figures** {_measured(evaluation, dataset)}\n\n{_table([main, *others])}",
        f"**Load it**\n\n{_loading(part, model)}",
        _facts(tags),
    ]
    return "\n\n".join(parts) + "\n"


def main_arm(evaluation: Mapping[str, Any], stage_key: str) -> Mapping[str, Any]:
    """Returns the arm of evaluation.json that measures the stage 2 of this key as it is."""
    arms: Sequence[Mapping[str, Any]] = evaluation["arms"]
    return next(a for a in arms if a["kind"] == "mantis" and a["stage_key"] == stage_key)


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for task in tasks[:MAX_TASKS]:
        labels = [_plain(label) for label in task.get("labels", [])]
        words = [f"{len(labels)} classes"] if labels else []
        words += labels[:MAX_LABELS] + ["..."] * (len(labels) > MAX_LABELS)
        words += ["a mask for each image"] if task.get("kind") == "segmentation" else []
        lines.append(f"- {_plain(task['name'])}{': ' if words else ''}{', '.join(words)}")
    if len(tasks) > MAX_TASKS:
        lines.append(f"- and {len(tasks) - MAX_TASKS} more")
    return "\n".join(lines)


def _measured(evaluation: Mapping[str, Any], dataset: Dataset | None) -> str:
    if dataset is None:
        return "on the evaluation split"
    rows = evaluation.get("rows")
    images = f"{rows} images of " if rows else ""
    return f"on {images}`{_plain(dataset.name)}`, digest `{dataset.digest}`"


def _table(arms: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of arms. The first, which is the model itself, is in bold."""
    shown = [name for name in FIGURES if any(name in arm["metrics"] for arm in arms)]
    lines = [
        "| " + " | ".join(["arm", *(FIGURES[name][0] for name in shown)]) + " |",
        "| --- " + "| ---: " * len(shown) + "|",
    ]
    for number, arm in enumerate(arms[:MAX_ARMS]):
        figures = [
            FIGURES[name][1](arm["metrics"][name]) if name in arm["metrics"] else "-"
            for name in shown
        ]
        name = _arm(arm, several_seeds=len({arm.get("seed") for arm in arms}) > 1)
        lines.append("| " + " | ".join([name if number else f"**{name}**", *figures]) + " |")
    if len(arms) > MAX_ARMS:
        lines.append(f"\nThe report has {len(arms) - MAX_ARMS} more arms.")
    return "\n".join(lines)


def _arm(arm: Mapping[str, Any], *, several_seeds: bool) -> str:
    words = [_plain(arm.get("label") or arm["kind"])]
    if arm.get("quality") is not None:
        words.append(f"quality {arm['quality']}")
    if arm.get("scale") is not None:
        words.append(f"at {arm['scale']:g} of its sides")
    if arm.get("rate_weight") is not None:
        words.append(f"rate weight {arm['rate_weight']:g}")
    if several_seeds:
        words.append(f"seed {arm['seed']}")
    return ", ".join(words)


def _loading(part: str, model: str) -> str:
    commands = {
        "client": [f"mantis encode {model} photo.jpg -o out.mts"],
        "server": [f"mantis decode {model} out.mts --json"],
    }
    commands["whole"] = commands["client"] + commands["server"]
    file = "out.mts" if part == "server" else "photo.jpg"
    column = INPUTS[part]
    return "\n".join(
        [
            "```bash",
            *commands[part],
            "```",
            "",
            "```python",
            "import mlflow",
            "import pandas as pd",
            "",
            f'model = mlflow.pyfunc.load_model("{model}")',
            f'rows = pd.DataFrame({{"{column}": [open("{file}", "rb").read()]}})',
            "print(model.predict(rows))",
            "```",
            "",
            "The input example is "
            + ("the stream of " if part == "server" else "")
            + "a picture that code has drawn: it shows nobody's data.",
        ]
    )


def _facts(tags: Mapping[str, str]) -> str:
    cost = ""
    if "mantis.client_bytes" in tags and "mantis.client_macs" in tags:
        megabytes = int(tags["mantis.client_bytes"]) / 1e6
        millions = int(tags["mantis.client_macs"]) / 1e6
        cost = f"- Client: {megabytes:.2f} MB, {millions:.1f} million multiply-adds for an image.\n"
    return (
        f"- Stream id `{tags.get('mantis.stream_id', tags['mantis.model_id'])}`: every stream "
        "carries it, and a server refuses the streams of another client.\n"
        f"- Model id `{tags['mantis.model_id']}`: names client and server together.\n"
        f"{cost}"
        f"- Config `{_plain(tags['mantis.config'])}`, {_rates(tags)}.\n"
        f"- {_code()}"
    )


def _rates(tags: Mapping[str, str]) -> str:
    levels = json.loads(tags.get("mantis.levels", "[]"))
    if not levels:
        return f"rate weight {tags['mantis.rate_weight']}"
    weights = ", ".join(f"{each['rate_weight']:g}" for each in levels)
    return f"rate weights {weights} in one model: a pyfunc takes the params level and max_bytes"


def _code() -> str:
    """Returns the package and its licence, as far as they are known: a checkout has no metadata."""
    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"Code: {DISTRIBUTION}."
    licence = "".join(f", licence {name}" for name in about.get_all("License-Expression", []))
    return f"Code: {DISTRIBUTION} {about['Version']}{licence}."


def _plain(text: str) -> str:
    """Returns a short name of the user's, without what Markdown or HTML takes for its own."""
    plain = re.sub(r"\s+", " ", re.sub(r"[|`<>*\[\]\\]", "_", text))
    return plain if len(plain) <= MAX_NAME else f"{plain[: MAX_NAME - 3]}..."
