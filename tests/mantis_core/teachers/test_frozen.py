"""The frozen teacher gives what the teacher gives, with fewer operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mantis_core.teachers.frozen import FrozenTeacher, folded
from mantis_core.teachers.teacher import Teacher


def a_teacher(name: str, split: str) -> Teacher:
    """With random weights and batch norms that do something."""
    torch.manual_seed(0)
    teacher = Teacher(name, split=split, flat_classes=4).eval()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return teacher


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def norms(module: nn.Module) -> int:
    return sum(isinstance(each, nn.BatchNorm2d) for each in module.modules())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("resnet18", "layer2"),
        ("mobilenet_v2", "features.3"),
        ("efficientnet_b0", "features.3"),
        ("regnet_y_400mf", "trunk_output.block2"),
        ("shufflenet_v2_x0_5", "stage2"),
    ],
)
def test_a_frozen_teacher_gives_what_the_teacher_gives_without_batch_norms(
    name: str, split: str
) -> None:
    teacher = a_teacher(name, split)
    frozen, expected = FrozenTeacher(teacher, [split], answers=True), teacher(images())
    assert norms(frozen) == 0 < norms(teacher)
    found = frozen(images(), teacher)
    pairs = [(found[split]["output"], expected["split"])]
    pairs += [(found["outputs"]["logits"], expected["logits"])]
    for value, other in pairs:
        assert (value - other).norm() <= 1e-5 * other.norm()


@torch.no_grad()
def test_only_blocks_that_are_read_are_kept() -> None:
    teacher = a_teacher("resnet18", "layer2")
    frozen = FrozenTeacher(teacher, ["layer1", "layer2.0.conv1"], answers=False)
    assert frozen.names[-1] == "layer2"
    io = frozen(images(), teacher)
    found = teacher.backbone.features(images(), ["layer1"])["layer1"]
    torch.testing.assert_close(io["layer1"]["output"], found, atol=1e-4, rtol=1e-5)
    before_norm = teacher.backbone.net.get_submodule("layer2.0.conv1")(found)
    torch.testing.assert_close(io["layer2.0.conv1"]["output"], before_norm, atol=1e-4, rtol=1e-5)
    assert io["outputs"] == {}
    assert FrozenTeacher(teacher, [], answers=False)(images(), teacher) == {"outputs": {}}


def test_a_network_that_cannot_be_traced_keeps_its_batch_norms() -> None:
    class Choosy(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return super().forward(x) if x.sum() > 0 else x

    net = Choosy(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert norms(folded(net)) == 1
