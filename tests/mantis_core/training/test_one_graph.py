"""A step's forward pass and loss as one graph for torch.compile, whatever the number of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mantis_core.config import DetectorConfig, LossTerm, ModelConfig, TeacherConfig
from mantis_core.tasks import Batch, Problem
from mantis_core.training.recipe import Recipe
from mantis_core.training.teacher import teacher_recipe

WATCHED = {
    "split": LossTerm(criterion="RelativeMSE", student="decoder", teacher="@split"),
    "layer3": LossTerm(criterion="RelativeMSE", student="tail.layer3", teacher="layer3"),
    "logits": LossTerm(criterion="TeacherLogits"),
    "classes": LossTerm(criterion="ClassDetection"),
}


@pytest.fixture
def recipes(
    problem: Problem,
    stage1_of: Callable[..., Any],
    stage2_of: Callable[..., Any],
    small_config: Callable[..., ModelConfig],
) -> dict[str, Callable[[], Recipe]]:
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    model = small_config(detector=detector, neighbour_contexts=True)
    teacher = TeacherConfig(name="resnet18", split="layer2", weights="train")
    return {
        "teacher": lambda: teacher_recipe(teacher, problem, seed=0),
        "stage1": lambda: stage1_of(problem, model, losses=WATCHED),
        "stage2": lambda: stage2_of(problem, model),
    }


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize("stage", ["teacher", "stage1", "stage2"])
def test_forward_and_loss_are_one_graph_with_the_same_loss(
    stage: str, recipes: dict[str, Callable[[], Recipe]], batch: Batch
) -> None:
    recipe = recipes[stage]().train()
    compiled = torch.compile(recipe.forward, fullgraph=True, backend="eager")
    losses = []
    for forward in (recipe.forward, compiled):
        torch.manual_seed(0)
        losses.append(forward(batch, 0.5).loss)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
