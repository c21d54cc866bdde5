"""Outputs of all classification tasks side by side, and the server's decoders run as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mantis_core.networks.server import pooled_features
from mantis_core.networks.stacked import TaskLayout, as_stacked
from mantis_core.tasks import Problem
from tests.mantis_core.narrow_resnet import WIDTHS


def shaken(module: nn.Module) -> nn.Module:
    """With weights that are nowhere zero, so that no part of the network is without effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def gradients(outputs: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The gradients of a number that reads every output, by parameter."""
    module.zero_grad()
    torch.manual_seed(2)
    sum((value.float() * torch.randn(value.shape)).sum() for value in outputs.values()).backward()  # type: ignore[union-attr]
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_stacked_server_answers_as_task_after_task_does(
    bf16: bool, mixed_problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    server = stage2_of(mixed_problem).student.server
    shaken(server.task_decoders)
    shaken(server.tails)
    latent = torch.randn(3, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        together = server(latent, (32, 32))
        split, last = server.features(latent)
        alone = {t.name: server.answer(t, split, last, (32, 32)) for t in server.tasks}
    assert set(together) == set(alone)
    close = {"atol": 3e-2, "rtol": 3e-2} if bf16 else {"atol": 1e-5, "rtol": 1e-5}
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, **close)
    if not bf16:
        found, expected = gradients(together, server), gradients(alone, server)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_signed_features_have_no_relu_at_the_end(
    problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    decoders = list(shaken(stage2_of(problem).student.server).task_decoders.children())
    deep = torch.randn(2, WIDTHS[3], 2, 3)
    for decoder in decoders:
        decoder.signed = True
    expected = torch.stack([decoder(deep).mean(dim=(2, 3)) for decoder in decoders])
    torch.testing.assert_close(pooled_features(decoders, deep), expected, atol=1e-5, rtol=1e-5)


def test_tasks_of_different_widths_stand_side_by_side(mixed_problem: Problem) -> None:
    layout = TaskLayout(mixed_problem.tasks)
    assert layout.columns.tolist() == [0, 1, 2]
    assert layout.not_mine.tolist() == [3, 2, 2]
    assert layout.is_label.sum(dim=1).tolist() == [3, 2, 2]
    outputs = {t.name: torch.randn(5, t.num_classes + 1) for t in mixed_problem.tasks[:3]}
    ground = torch.randn(5, 3, 4, 4)
    stacked = as_stacked({**outputs, "ground": ground}, layout)
    assert stacked.log_p is not None
    assert stacked.log_p.shape == (5, 3, 4)
    assert (stacked.log_p == -torch.inf).sum() == 2 * 5
    assert all(torch.equal(stacked[name], value) for name, value in outputs.items())
    assert torch.equal(stacked["ground"], ground)
    assert as_stacked(stacked, layout) is stacked


def test_segmentations_alone_have_nothing_to_stack(mixed_problem: Problem) -> None:
    ground = {"ground": torch.randn(5, 3, 4, 4)}
    stacked = as_stacked(ground, TaskLayout(mixed_problem.tasks[-1:]))
    assert stacked.log_p is None
    assert list(stacked) == ["ground"]
