"""What a step asks of the device: how the benchmark counts it, and what it may ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.step import Counter, counted, graphs_of, problem_with, random_batch
from mantis_core.architecture import DetectorConfig
from mantis_core.config import Stage1Config, Stage2Config
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.loop import Session
from mantis_core.training.stage1 import stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from tests.mantis_core.conftest import QUICK, make_config

PIXELS = 32


def step_with(tasks: int) -> dict[str, Any]:
    """The counts of a step of a small stage 2 with this many tasks."""
    problem = problem_with(tasks, PIXELS)
    names = {"tasks": problem.tasks, "flat_classes": len(problem.classes)}
    teacher = Teacher("resnet18", split="layer2", image_size=problem.image_size, **names)  # type: ignore[arg-type]
    model = make_config(
        detector=DetectorConfig(channels=8, blocks=0, hidden=8, classes=True),
        neighbour_contexts=True,
    )
    first = stage1_recipe(Stage1Config(), model, teacher, problem, seed=0)
    config = Stage2Config(**QUICK)  # type: ignore[arg-type]
    recipe = stage2_recipe(config, model, teacher, problem, first.student.shipped(), seed=0)  # type: ignore[operator]
    session = Session(recipe.train(), config, steps_per_epoch=9, seed=0)
    return counted(session, random_batch(problem, 4, "cpu"))


def test_a_step_waits_for_no_device_and_hardly_grows_with_tasks() -> None:
    few, many = step_with(3), step_with(9)
    assert few["synchronisations"] == many["synchronisations"] == {}
    assert few["forward"] == many["forward"]
    assert few["update"] == many["update"]
    # A task has 9 parameters, and each takes its own gradient.
    assert many["backward"] - few["backward"] == 9 * (9 - 3)


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_what_makes_the_cpu_wait_is_counted(wait: Any, name: str) -> None:
    with Counter() as counter:
        wait(torch.ones(3))
        torch.ones(3)[torch.tensor([0, 1])]
    assert counter.synchronisations == {name: 1}


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_graphs_are_counted_where_the_compiler_cuts() -> None:
    def cut(x: Any, progress: float) -> Any:
        x = x + progress
        torch._dynamo.graph_break()
        return x * 2

    session: Any = SimpleNamespace(recipe=SimpleNamespace(forward=cut))
    assert graphs_of(session, torch.ones(3)) == 2  # type: ignore[arg-type]


def test_views_are_operations_that_compute_nothing() -> None:
    x = torch.ones(2, 3)
    with Counter() as counter:
        x.view(3, 2).neg()
    assert (counter.operations, counter.views) == (2, 1)
