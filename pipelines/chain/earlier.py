"""Recipes as code before 2026-11-28 computed them: rows and old stages are found by these too.

A recipe then held every field of the config, also four that have been deleted since.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pipelines.chain.keys import digest
from pipelines.stages.spec import StageSpec

RETIRED: dict[str, dict[str, Any]] = {
    "model.encoder": {"summary_channels": 0, "summary_hidden": 256},
    "model.decoder": {"summary_hidden": 256},
    "individual": {"backbone": None},
}
"""Fields that recipes held and that are gone, with the value every config had there."""
ADDED: dict[str, dict[str, Any]] = {
    "data": {
        "revision": "",
        "single_class": "auto",
        "stored_format": "webp",
        "val_fraction": None,
    },
    "model": {
        "wide_encoder": False,
        "send_answer": False,
        "requests": "both",
        "exit_heads": False,
        "client": "residual",
    },
    "model.encoder": {"start": "stem"},
    "stage1": {"quantizer": None, "start": "random"},
    "stage2": {
        "quantizer": None,
        "freeze_stem": True,
        "answer_dropout": 0.2,
        "rate_weights": [],
        "requests": [],
    },
    "codec_teacher": {"scales": [1.0]},
}
"""Fields that recipes did not hold yet, with their default. Another value has no old recipe."""

ADDED_TO_SOURCES: dict[str, Any] = {"train_labels": None}
"""The same for the fields of a source."""
ADDED_TO_TASKS: dict[str, Any] = {"parent": None}
"""The same for the fields of a task."""


def recipes_before(specs: Sequence[StageSpec]) -> dict[str, str]:
    """The recipe by which each stage was known, by the stage's name."""
    found: dict[str, str] = {}
    for spec in specs:
        config = copy.deepcopy(spec.config)
        for place, fields in RETIRED.items():
            if section := _section(config, place):
                section |= fields
        for place, fields in ADDED.items():
            section = _section(config, place)
            for name, default in fields.items():
                if name in section and section[name] == default:
                    del section[name]
        lists = (
            (config.get("data", {}).get("sources", []), ADDED_TO_SOURCES),
            (config.get("tasks", []), ADDED_TO_TASKS),
        )
        for entries, added in lists:
            for entry in entries:
                for name, default in added.items():
                    if name in entry and entry[name] == default:
                        del entry[name]
        if spec.kind == "stage1":  # its slice named single fields of the decoder
            config["model"]["decoder"] = {
                name: config["model"]["decoder"][name]
                for name in ("channels", "blocks", "summary_hidden")
            }
        upstream = {name: found[name] for name in spec.upstream}
        found[spec.name] = digest({"kind": spec.kind, "config": config, "upstream": upstream})
    return found


def _section(config: dict[str, Any], place: str) -> dict[str, Any]:
    """Returns the section at a dotted place, and an empty one where there is none."""
    section = config
    for name in place.split("."):
        section = section.get(name, {})
    return section
