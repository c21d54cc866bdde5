"""For tests of recipes: what of a module changed, what got no gradient, one short epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mantis_core.config import TrainingConfig
from mantis_core.tasks import Batch
from mantis_core.training.loop import Session


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, non-persistent ones too."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


def changed(module: nn.Module, before: dict[str, Tensor]) -> list[str]:
    now = snapshot(module)
    return [name for name in before if not torch.equal(before[name], now[name])]


def train(recipe: Any, batches: list[Batch]) -> None:
    config = getattr(recipe, "config", TrainingConfig(epochs=1, batch_size=4))
    session = Session(recipe, config, steps_per_epoch=len(batches), seed=0)
    session.train_epoch(batches)


def without_gradient(module: nn.Module) -> list[str]:
    return [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
