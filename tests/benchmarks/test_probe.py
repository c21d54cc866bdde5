"""benchmarks/probe.py: a probe finds what latents hold of a task, and nothing where they do not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.probe import Coded, accuracies, chance, probed, table
from mantis_core.tasks import TaskSpec

TASKS = [(k, TaskSpec(name, "classification", 2)) for k, name in enumerate(("seen", "hidden"))]


def latents(count: int, seed: int) -> Coded:
    """Maps whose first channel shows the label of the first task, and of no other."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count, 2), generator=random)
    maps = torch.randint(-1, 2, (count, 2, 4, 4), generator=random)
    maps[:, 0] = (2 * labels[:, 0] - 1)[:, None, None]
    return Coded(maps.to(torch.int8), labels)


def test_a_probe_tells_what_latents_hold_and_is_at_chance_for_the_rest() -> None:
    seen, hidden = probed(latents(400, 0), latents(300, 1), TASKS, seed=0)
    assert seen == 1.0
    assert abs(hidden - 0.5) < 0.1


def test_chance_is_the_most_frequent_label_of_the_training_images() -> None:
    maps = torch.zeros(4, 1, 2, 2, dtype=torch.int8)
    train = Coded(maps, torch.tensor([[1], [1], [0], [-1]]))
    val = Coded(maps, torch.tensor([[1], [0], [0], [-1]]))
    assert chance(train, val, 0) == pytest.approx(1 / 3)


def test_images_without_a_task_do_not_count() -> None:
    class Ones(torch.nn.Module):
        def forward(self, maps: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"seen": torch.tensor([[0.0, 1.0]]).expand(len(maps), 2)}

    found = Coded(torch.zeros(4, 1, 2, 2), torch.tensor([[1], [-1], [0], [-1]]))
    assert accuracies(Ones(), found, TASKS[:1]) == [0.5]  # type: ignore[arg-type]


def test_the_table_has_a_row_for_each_request_and_one_for_chance() -> None:
    rows = [
        {"request": name, "accuracy": {"seen": value, "hidden": 0.5}}
        for name, value in (("seen", 0.9), ("all", 0.8), ("chance", 0.4))
    ]
    shown = table(["seen", "all"], [task for _, task in TASKS], rows)
    assert [column.header for column in shown.columns] == ["request", "seen", "hidden"]
    assert list(shown.columns[0].cells) == ["seen", "all", "chance"]
    assert list(shown.columns[1].cells) == ["90.0", "80.0", "40.0"]
