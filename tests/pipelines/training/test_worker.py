"""A training in its worker: what it reads, and what it records. Whole runs are in
test_end_to_end.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mantis_core.config import TrainingConfig
from mantis_core.folders import load_training_state, read_meta
from mantis_core.tasks import Batch, Problem
from mantis_core.training.loop import Session
from pipelines.settings.sections import Settings
from pipelines.storage import Store
from pipelines.terminal import progress
from pipelines.training import worker
from pipelines.training.job import Training
from pipelines.training.worker import (
    EpochReports,
    Place,
    holdout_batches,
    keep_decoded,
    read_once,
)
from tests.mantis_core.conftest import make_batch, make_problem, make_stage1


def training_of(kind: str, folder: Path, seed: int = 0, **cluster: Any) -> Training:
    settings = Settings.model_validate(
        {
            "seed": seed,
            "data": {"sources": [{"kind": "shapes"}]},
            "tasks": [{"name": "outline", "classes_from": "shapes"}],
            "cluster": cluster,
            "storage": {"root": str(folder)},
        }
    )
    return Training(
        name=kind,
        kind=kind,
        key="a key",
        settings=settings,
        section=TrainingConfig(),
        recipe=lambda *_: make_stage1(make_problem()),
        prepared="shards",
        folder=str(folder),
        checkpoints=str(folder / "checkpoints"),
        upstream={},
    )


def drawn(monkeypatch: pytest.MonkeyPatch, training: Training) -> dict[str, Any]:
    """What a plain training asks of the reader for its second epoch."""
    asked: dict[str, Any] = {}

    def read(*_: Any, **options: Any) -> list[Any]:
        asked.update(options)
        return []

    monkeypatch.setattr(worker, "read_manifest", lambda folder: None)
    monkeypatch.setattr(worker, "local_batches", read)
    monkeypatch.setattr(worker, "train", lambda *own, **_: list(own[3](1)))
    worker.train_plainly(training, threads=1, on_epoch=lambda *_: None)
    return asked


def test_no_stage_replays_the_crops_and_the_order_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("teacher", "stage1", "stage2", "individual", "codec_teacher")
    asked = [drawn(monkeypatch, training_of(kind, tmp_path)) for kind in kinds]
    again = drawn(monkeypatch, training_of("stage2", tmp_path))
    other = drawn(monkeypatch, training_of("stage2", tmp_path, seed=1))
    assert len({each["seed"] for each in [*asked, other]}) == len(kinds) + 1
    assert again == asked[2]
    assert {each["epoch"] for each in asked} == {1}


@pytest.mark.parametrize(("amp", "precision"), [("off", "float32"), ("bf16", "bf16")])
def test_a_trained_model_records_what_it_was_computed_on(
    amp: str, precision: str, tmp_path: Path
) -> None:
    problem: Problem = make_problem()
    recipe = make_stage1(problem, epochs=1, amp=amp)
    session = Session(recipe, recipe.config, steps_per_epoch=1, seed=0)

    def batches() -> list[Batch]:
        return [make_batch(problem, 4)]

    session.train_epoch(batches())
    session.evaluate(batches)
    place = Place(torch.device("cpu"), rank=0, world=3)
    worker.ship(session, training_of("stage1", tmp_path), [], place)
    recorded = read_meta(tmp_path / "checkpoint")["computed_on"]
    assert recorded["device"] == "cpu"
    assert recorded["precision"] == precision
    assert recorded["workers"] == 3
    assert Store(str(tmp_path)).exists("best.json")


def test_a_worker_reads_the_holdout_rows_of_its_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def local_batches(*_: Any, **wanted: Any) -> Any:
        asked.update(wanted)
        rows = np.arange(2)
        yield {
            "image": np.zeros((2, 3, 4, 4), np.uint8),
            "class_label": rows,
            "labels": rows[:, None],
            "task_mask": rows[:, None] >= 0,
            "row_id": rows,
        }

    monkeypatch.setattr(worker, "local_batches", local_batches)
    training: Any = SimpleNamespace(
        prepared="nowhere",
        section=SimpleNamespace(batch_size=8),
        settings=SimpleNamespace(data=SimpleNamespace(reading=None, cache="none")),
    )
    place = Place(torch.device("cpu"), rank=1, world=4)
    (batch,) = holdout_batches(training, None, place)  # type: ignore[arg-type]
    assert batch.row_id.tolist() == [0, 1]
    threads = torch.get_num_threads()
    how = {"split": "holdout", "global_batch": 8, "rank": 1, "world_size": 4}
    assert asked == {**how, "threads": threads, "cache": None}


@pytest.mark.parametrize(("room", "fits"), [("decoded", True), ("decoded", False), ("none", False)])
def test_a_worker_reads_decoded_images_where_they_fit(
    room: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def kept_rows(cache: Path, *given: Any, **how: Any) -> Any:
        asked.append((cache, how["split"]))
        return object() if fits else None

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(worker, "kept_rows", kept_rows)
    data = SimpleNamespace(reading=None, cache=room)
    training: Any = SimpleNamespace(prepared="here", settings=SimpleNamespace(data=data))
    assert keep_decoded(training, None, Place(torch.device("cpu"))) is fits  # type: ignore[arg-type]
    folder = tmp_path / "mantis" / "decoded"
    assert asked == ([(folder, "train")] if room == "decoded" else [])
    if room == "decoded":
        assert folder.stat().st_mode & 0o077 == 0  # nobody else puts images there


@pytest.mark.parametrize(("most_bytes", "times"), [(10**9, 1), (3000, 3), (0, 3)])
def test_held_back_rows_are_read_once_where_they_fit(most_bytes: float, times: int) -> None:
    batches = [make_batch(make_problem(), count=1, seed=seed) for seed in range(3)]
    assert batches[0].nbytes > 3000
    read = 0

    def holdout() -> Iterator[Batch]:
        nonlocal read
        read += 1
        yield from batches

    again = read_once(holdout, most_bytes)
    for _ in range(3):
        assert list(again()) == batches
    assert read == times


def test_rows_that_were_not_all_read_are_not_kept() -> None:
    batches = [make_batch(make_problem(), count=1, seed=seed) for seed in range(3)]
    again = read_once(lambda: iter(batches), 10**9)
    next(again())
    assert list(again()) == batches


class FiveEpochs:
    """A session whose epochs end; `epoch` of them have."""

    config, epoch = SimpleNamespace(epochs=5), 0

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"weight": torch.tensor([float(self.epoch)])}, {"step": self.epoch}


@pytest.mark.parametrize(
    ("every_s", "kept"), [(0, [1, 2, 3, 4, 5]), (25, [3, 5]), (10, [1, 2, 3, 4, 5]), (1e9, [5])]
)
def test_a_checkpoint_is_written_when_it_is_due_and_at_the_end(
    every_s: float, kept: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import train as ray_train

    told: list[int] = []
    stored: list[int] = []

    def report(metrics: dict[str, Any], checkpoint: Any = None) -> None:
        told.append(len(json.loads(metrics["history"])))
        if checkpoint is not None:
            stored.append(load_training_state(checkpoint.path)[1]["step"])

    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(ray_train, "report", report)
    monkeypatch.setattr(progress, "report_epoch", lambda *_: None)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    training = training_of("stage1", tmp_path, checkpoint_every_s=every_s)
    reports, session = EpochReports(training, Place(torch.device("cpu"))), FiveEpochs()
    for session.epoch in range(1, 6):
        reports(session, [{"epoch": float(each)} for each in range(session.epoch)])  # type: ignore[arg-type]
    assert told == [1, 2, 3, 4, 5]
    assert stored == kept
