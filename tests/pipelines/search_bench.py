"""A search without trainings for tests: a small config, its task, and what a trial would bring."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from data_prep.finding import source_fingerprint
from data_prep.tasks import resolve_tasks
from pipelines.search.points import RdPoint, SearchObjective
from pipelines.search.space import load_space
from pipelines.search.trial import SearchTask, TrialOutcome, search_settings
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings
from tune_spaces.domains import Space

REFERENCE = RdPoint(10_000.0, 0.0)
PARETO = SearchObjective("pareto", REFERENCE)
CONFIG: dict[str, Any] = {
    "data": {"sources": [{"kind": "shapes", "train_rows": 20, "val_rows": 10}]},
    "tasks": [{"name": "outline", "classes_from": "shapes"}],
    "teacher": {"weights": "train"},
    "stage2": {"epochs": 9},
    "tune": {"startup_trials": 4},
}


def small_settings(folder: Path, **sections: Any) -> Settings:
    """A config under `folder`; `sections` are put over those above."""
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump({**CONFIG, "storage": {"root": str(folder / "runs")}, **sections})
    )
    return load_settings(path)


def small_task(settings: Settings) -> SearchTask:
    """What trials share, without a look at Ray."""
    alone = search_settings(settings)
    table = resolve_tasks(alone.tasks, alone.data)
    return SearchTask(alone, table, source_fingerprint(alone.data, table), "tiny")


def joint() -> Space:
    return load_space("joint", include_stage1=False)


def learned(params: Mapping[str, Any], epoch: int, epochs: int = 9) -> dict[str, float]:
    """What a training might measure: bits fall with the rate weight, accuracy with them."""
    bits = 40 / (params["stage2.rate_weight"] / 3e-4) ** 0.5 * (1 + 1 / epoch)
    width = 0.9 if params["model.prior"] == "shared" else 1.0
    top1 = width * (1 - math.exp(-bits / 12)) * (0.6 + 0.4 * epoch / epochs)
    return {
        "epoch": float(epoch),
        "holdout/bits": bits,
        "holdout/top1": top1,
        "holdout/loss": 1 - top1 + params["stage2.rate_weight"] * bits,
    }


def outcome(
    params: Mapping[str, Any], epochs: int = 9, state: str = "finished", reason: str = ""
) -> TrialOutcome:
    history = tuple(learned(params, epoch) for epoch in range(1, epochs + 1))
    figures = dict(history[-1]) if state == "finished" else {}
    now = time.time()
    return TrialOutcome(state, reason, history, figures, now - 2, now - 1, now)
