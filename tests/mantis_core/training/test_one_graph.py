"""Stage 2 as one graph for torch.compile, whatever the number of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mantis_core.config import DetectorConfig, ModelConfig
from mantis_core.tasks import Batch, Problem


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_forward_and_loss_of_stage_2_are_one_graph_with_the_same_loss(
    problem: Problem,
    stage2_of: Callable[..., Any],
    small_config: Callable[..., ModelConfig],
    batch: Batch,
) -> None:
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    model = small_config(detector=detector, neighbour_contexts=True)
    recipe = stage2_of(problem, model).train()
    compiled = torch.compile(recipe.forward, fullgraph=True, backend="eager")
    losses = []
    for forward in (recipe.forward, compiled):
        torch.manual_seed(0)
        losses.append(forward(batch, 0.5).loss)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
