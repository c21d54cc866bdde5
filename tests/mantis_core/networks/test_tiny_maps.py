"""Convolutions on tiny maps: the same values and gradients as torch's, whatever the map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from mantis_core.networks import tiny_maps
from mantis_core.networks.tiny_maps import LEAST_BATCH, TinyMapConv2d, fast_on_tiny_maps
from mantis_core.teachers.backbone import Backbone
from mantis_core.teachers.frozen import folded


def layer(inputs: int = 5, outputs: int = 7, *, bias: bool = True) -> nn.Conv2d:
    torch.manual_seed(0)
    made = fast_on_tiny_maps(nn.Sequential(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=bias)))
    return made[0]  # type: ignore[index, no-any-return]


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 3), (4, 4)])
@pytest.mark.parametrize("count", [1, LEAST_BATCH - 1, LEAST_BATCH, 2 * LEAST_BATCH])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_values_and_gradients_are_those_of_torch(
    size: tuple[int, int], count: int, bias: bool, last: bool
) -> None:
    own = layer(bias=bias)
    x = torch.randn(count, 5, *size)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    towards = torch.randn(count, 7, *size)
    parameters = [x, *own.parameters()]
    found = own(x)
    expected = conv2d(x, own.weight, own.bias, 1, 1)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = torch.autograd.grad(found, parameters, towards)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, parameters, towards), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_tiny_map_is_one_matrix_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    linear = tiny_maps.linear
    monkeypatch.setattr(tiny_maps, "linear", lambda *given: calls.append(given) or linear(*given))
    own = layer()
    for count, side in ((LEAST_BATCH, 2), (LEAST_BATCH - 1, 2), (LEAST_BATCH, 3)):
        own(torch.zeros(count, 5, side, side))
    assert len(calls) == 1
    assert calls[0][1].shape == (4 * 7, 4 * 5)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.Conv2d(4, 4, 3, 1, 0),
        nn.Conv2d(4, 4, 3, 1, 2, dilation=2),
        nn.Conv2d(4, 4, 3, 1, 1, groups=2),
        nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_are_left_alone(other: nn.Conv2d) -> None:
    assert type(fast_on_tiny_maps(other)) is nn.Conv2d


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "efficientnet_b0"])
def test_a_teacher_is_the_network_it_was_folded_too(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name).eval()
    plain = copy.deepcopy(backbone)
    for module in plain.modules():
        if type(module) is TinyMapConv2d:
            module.__class__ = nn.Conv2d
    images = torch.randn(LEAST_BATCH, 3, 64, 64)
    with torch.no_grad():
        expected, found = plain(images), backbone(images)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
        frozen = folded(backbone.net)
        kept = [module for module in frozen.modules() if isinstance(module, nn.BatchNorm2d)]
        assert not kept
        again = images
        for block in backbone.names:
            again = frozen.get_submodule(block)(again)
        assert torch.allclose(again, expected, atol=1e-3 * float(expected.abs().max()))
    assert list(backbone.state_dict()) == list(plain.state_dict())
