"""Checkpoints in storage: the newest one that reads whole, and Ray Train's notes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mantis_core.folders import save_training_state
from pipelines.cluster.ray_private import TRAIN_NOTES
from pipelines.storage import Store
from pipelines.training.checkpoints import drop_notes, newest_intact


@pytest.fixture
def training(tmp_path: Path) -> Store:
    """Checkpoints of steps 10 and 20; the clock of the node that wrote the later one is behind."""
    for step, name in ((10, "checkpoint_2026-11-25_12-00"), (20, "checkpoint_2026-11-25_11-00")):
        save_training_state(tmp_path / name, {"w": torch.full((9,), float(step))}, {"step": step})
    (tmp_path / TRAIN_NOTES).write_text("{}")
    return Store(tmp_path)


def newest(training: Store) -> Path:
    return Path(training.root) / "checkpoint_2026-11-25_11-00"


def test_the_checkpoint_of_the_most_steps_is_taken(training: Store) -> None:
    notes: list[str] = []
    found = newest_intact(training, notes.append)
    assert found is not None
    assert (found.name, found.record["step"]) == ("checkpoint_2026-11-25_11-00", 20)
    assert found.tensors["w"].tolist() == [20.0] * 9
    assert notes == []


@pytest.mark.parametrize("file", ["training_state.safetensors", "training_state.json"])
@pytest.mark.parametrize("left", [0, 20])
def test_one_that_was_cut_short_is_named_once_and_the_one_before_it_taken(
    training: Store, file: str, left: int
) -> None:
    whole = (newest(training) / file).read_bytes()
    (newest(training) / file).write_bytes(whole[:left])
    notes: list[str] = []
    found = newest_intact(training, notes.append)
    assert found is not None
    assert found.record["step"] == 10
    (note,) = notes
    assert str(newest(training)) in note
    assert "resuming from checkpoint_2026-11-25_12-00" in note


def test_without_an_intact_one_training_begins_anew(training: Store) -> None:
    for state in Path(training.root).glob("*/training_state.safetensors"):
        state.unlink()
    notes: list[str] = []
    assert newest_intact(training, notes.append) is None
    assert "the training starts again" in notes[0]


def test_a_training_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_intact(Store(tmp_path / "new"), pytest.fail) is None


@pytest.mark.parametrize("text", [b'{"checkpoint_results": []}', b"{", None])
def test_rays_notes_on_an_earlier_attempt_are_dropped_and_its_checkpoints_stay(
    training: Store, text: bytes | None
) -> None:
    if text is not None:
        training.write_bytes(TRAIN_NOTES, text)
    before = set(training.list()) - {TRAIN_NOTES}
    drop_notes(training)
    assert set(training.list()) == before
    assert len(before) == 2
