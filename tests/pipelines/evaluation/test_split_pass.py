"""A pass over the evaluation split, its models left out: every row once, whatever dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.manifest import Manifest
from data_prep.prepare.shards import prepare
from data_prep.tasks import resolve_tasks
from pipelines.evaluation import split_pass
from pipelines.evaluation.arms import SPLIT, ArmSource, Arrays
from pipelines.evaluation.split_pass import EvaluationError, collected, evaluate_split
from pipelines.settings.sections import Settings

SOURCES = [ArmSource("one", "teacher", None), ArmSource("two", "teacher", None)]


class Dying:
    """An actor that answers nothing but who it was asked; the first to have a batch dies of it."""

    def __init__(self, *, settings: dict[str, Any], **_: Any) -> None:
        self.flag = Path(settings["storage"]["root"], "died")

    def __call__(self, batch: Arrays) -> Arrays:
        if not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rows = len(batch["row_id"])
        return {
            "row_id": np.tile(batch["row_id"], 2),
            "arm": np.repeat([0, 1], rows),
            "process": np.full(2 * rows, os.getpid()),
        }


def prepared(root: Path) -> tuple[Settings, Manifest]:
    source = {"kind": "shapes", "train_rows": 20, "val_rows": 200, "size": 32}
    settings = Settings.model_validate(
        {
            "data": {"sources": [source], "image_size": 32, "row_group_rows": 4},
            "tasks": [{"name": "outline", "classes_from": "shapes"}],
            "evaluate": {"batch_size": 7},
            "cluster": {"evaluation_actors": 2},  # as many as CPUs: one is left to the reader
            "storage": {"root": str(root)},
        }
    )
    table = resolve_tasks(settings.tasks, settings.data)
    return settings, prepare(settings.data, table, seed=0, output=str(root / "shards"))


@pytest.mark.usefixtures("ray_session")
def test_a_dead_actor_loses_and_doubles_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, manifest = prepared(tmp_path)
    monkeypatch.setattr(split_pass, "ArmActor", Dying)
    shards = str(tmp_path / "shards")
    done = evaluate_split(shards, manifest, settings.data.reading, SOURCES, settings=settings)
    assert (tmp_path / "died").exists()
    for source in SOURCES:
        ids = done.answers[source.name]["row_id"]
        assert len(ids) == len(np.unique(ids)) == manifest.split(SPLIT).rows > 2 * 7
    assert (np.diff(done.answers["one"]["row_id"]) > 0).all()


@pytest.mark.usefixtures("ray_session")
def test_a_row_that_is_lost_or_doubled_is_no_evaluation(tmp_path: Path) -> None:
    _, manifest = prepared(tmp_path)
    rows = manifest.split(SPLIT).rows
    arm, ids = np.repeat([0, 1], rows), np.tile(np.arange(rows), 2)
    collected([{"arm": arm, "row_id": ids}], SOURCES, manifest)
    with pytest.raises(EvaluationError, match=f"two: {rows - 1} answers"):
        collected([{"arm": arm[:-1], "row_id": ids[:-1]}], SOURCES, manifest)
    doubled = np.where(np.arange(2 * rows) == 5, 4, ids)
    with pytest.raises(
        EvaluationError, match=rf"one: {rows} answers \({rows - 1} different rows\)"
    ):
        collected([{"arm": arm, "row_id": doubled}], SOURCES, manifest)
