"""What a registered version says of itself: its tags, and the line that look-ups make of them.

A model of several rates has the figures of each of its levels, and a look-up with bounds names the
level that keeps within them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from mlflow.entities.model_registry import ModelVersion

from pipelines.tracking.lookup import StageRun
from pipelines.tracking.metric_writer import finite
from pipelines.tracking.pages.description import main_arm

FIGURES = ("val/top1", "val/bpp", "val/wire_bytes")
LEVELS = "mantis.levels"
_OF_LEVEL = ("level", "rate_weight", *(figure.removeprefix("val/") for figure in FIGURES))


def codec_stage(stages: Mapping[str, StageRun]) -> StageRun:
    """Returns the stage that made a codec: the one that added tasks to it, or its stage 2."""
    return stages["extend"] if "extend" in stages else stages["stage2"]


def tags_of(
    evaluation: Mapping[str, Any], stages: Mapping[str, StageRun], config_name: str
) -> dict[str, str]:
    """Returns the tags of a version: its stages, its config and the main arm's figures."""
    key = codec_stage(stages).key
    arm = main_arm(evaluation, key)
    figures = finite(arm["metrics"])
    return {
        "mantis.stage_key": key,
        "mantis.evaluate_key": stages["evaluate"].key,
        "mantis.data_key": stages["prepare"].key,
        "mantis.config": config_name,
        "mantis.tasks": ", ".join(task["name"] for task in evaluation["tasks"]),
        "mantis.rate_weight": str(arm["rate_weight"]),
        **{name: str(figures[name]) for name in FIGURES if name in figures},
        **_level_tag(evaluation, key),
    }


def _level_tag(evaluation: Mapping[str, Any], stage_key: str) -> dict[str, str]:
    """Returns the tag with the figures of each level, {} for a model of one rate."""
    found = []
    for arm in evaluation["arms"]:
        if arm["kind"] != "mantis" or arm["stage_key"] != stage_key or arm.get("level") is None:
            continue
        figures = finite(arm["metrics"])
        own = [arm["level"], arm["rate_weight"], *(figures.get(name) for name in FIGURES)]
        found.append(dict(zip(_OF_LEVEL, own, strict=True)))
    return {LEVELS: json.dumps(found)} if found else {}


def client_tags(meta: Mapping[str, Any]) -> dict[str, str]:
    """Returns tags with the cost of the client, the model's id and the one its streams carry."""
    tags = {f"mantis.{name}": str(value) for name, value in meta.get("client", {}).items()}
    stream_id = meta.get("stream_id", meta["model_id"])
    ids = {"mantis.model_id": meta["model_id"], "mantis.stream_id": stream_id}
    parent = {"mantis.parent": meta["parent"]} if "parent" in meta else {}
    return {**tags, **ids, **parent}


def summary(
    version: ModelVersion,
    aliases: list[str],
    *,
    max_bpp: float | None = None,
    min_top1: float | None = None,
) -> dict[str, Any]:
    """Returns a version with its figures.

    Those of a model of several rates are of the level that keeps within the bounds: with `max_bpp`
    the most accurate one, with `min_top1` alone the smallest. Without bounds, or where no level
    keeps within them, they are of the level with the best answers.
    """
    names = (*FIGURES, "mantis.rate_weight")
    tags = [version.tags.get(name) for name in names]
    figures: dict[str, Any] = {
        name.rpartition("/")[2].removeprefix("mantis."): None if tag is None else float(tag)
        for name, tag in zip(names, tags, strict=True)
    }
    levels = json.loads(version.tags.get(LEVELS, "[]"))
    within = [
        each
        for each in levels
        if (max_bpp is None or (each["bpp"] is not None and each["bpp"] <= max_bpp))
        and (min_top1 is None or (each["top1"] is not None and each["top1"] >= min_top1))
    ]
    if within and max_bpp is not None:
        figures |= max(within, key=lambda each: each["top1"] or 0.0)
    elif within and min_top1 is not None:
        figures |= min(within, key=lambda each: math.inf if each["bpp"] is None else each["bpp"])
    elif levels:
        figures |= levels[0]
    return {
        "model": f"models:/{version.name}/{version.version}",
        "name": version.name,
        "version": str(version.version),
        "aliases": aliases,
        **{name: figures[name] for name in ("top1", "bpp", "wire_bytes", "rate_weight")},
        "level": figures.get("level"),
        "levels": levels,
        "client_bytes": _whole_number(version.tags.get("mantis.client_bytes")),
        "client_macs": _whole_number(version.tags.get("mantis.client_macs")),
        "model_id": version.tags.get("mantis.model_id"),
        "stream_id": version.tags.get("mantis.stream_id", version.tags.get("mantis.model_id")),
        "parent": version.tags.get("mantis.parent"),
        "config": version.tags.get("mantis.config"),
        "trial": _whole_number(version.tags.get("mantis.trial")),
        "overrides": json.loads(version.tags.get("mantis.overrides", "{}")),
        "tasks": version.tags.get("mantis.tasks"),
        "data_key": version.tags.get("mantis.data_key"),
        "stage_key": version.tags.get("mantis.stage_key"),
        "evaluate_key": version.tags.get("mantis.evaluate_key"),
        "run_id": version.run_id,
    }


def _whole_number(tag: str | None) -> int | None:
    return None if tag is None else int(tag)
