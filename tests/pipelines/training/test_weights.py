"""Weights of finished stages and given teachers, as a training worker loads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mantis_core.errors import ModelError
from mantis_core.tasks import Problem, TaskSpec
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings
from pipelines.training import weights

PROBLEM = Problem(
    tasks=(TaskSpec("pets", "classification", 2, (0, 1), ("cat", "dog")),),
    classes=("cat", "dog"),
    class_names=("cat", "dog"),
    single_class=True,
    image_size=(8, 8),
    short_side=8,
)


class Brightness(nn.Module):
    """Stands for a teacher: takes bright images for dogs, or for cats if it is `swapped`."""

    def __init__(self, *, swapped: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.0, -1.0] if swapped else [-1.0, 1.0]))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": images.mean(dim=(1, 2, 3))[:, None] * self.gain}


def settings_of(tmp_path: Path, *overrides: str) -> Settings:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "data: {sources: [{kind: shapes}]}\ntasks: [{name: outline, classes_from: shapes}]\n"
    )
    return load_settings(path, overrides)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that were read; four held-back rows, endless ones to train on."""
    splits: list[str] = []

    def batches(folder: str, manifest: Any, reading: Any, **given: Any) -> Iterator[Any]:
        splits.append(given.get("split", "train"))
        for _ in range(1 if splits[-1] == "holdout" else 1000):
            label = torch.tensor([0, 1, 0, 1]).numpy()
            yield {
                "image": (200 * label[:, None, None, None] + [[[[20]]]]).repeat(3, 1).astype("u1"),
                "class_label": label,
                "labels": label[:, None],
                "task_mask": label[:, None] >= 0,
                "row_id": label,
            }

    manifest = SimpleNamespace(split=lambda name: SimpleNamespace(rows=1000))
    monkeypatch.setattr(weights, "local_batches", batches)
    monkeypatch.setattr(weights, "read_manifest", lambda folder: manifest)
    return splits


def test_a_given_teacher_is_asked_about_held_back_rows_and_then_about_others(
    read: list[str], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, "teacher.weights=t.pth")
    weights.check_given(Brightness(swapped=False), settings, PROBLEM, "folder")  # type: ignore[arg-type]
    assert read == ["holdout", "train"]


def test_a_given_teacher_with_logits_in_another_order_is_refused(
    read: list[str], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path, "teacher.weights=t.pth")
    with pytest.raises(ModelError, match=r"'cat' for 'dog'.*teacher\.classes"):
        weights.check_given(Brightness(swapped=True), settings, PROBLEM, "folder")  # type: ignore[arg-type]


def test_a_teacher_that_is_trained_here_is_asked_nothing(read: list[str], tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "teacher.weights=train")
    weights.check_given(Brightness(swapped=True), settings, PROBLEM, "folder")  # type: ignore[arg-type]
    assert read == []
