"""What networks cost: counted multiply-adds, and networks that are made to cost as much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mantis_core.architecture import ConditioningConfig, DetectorConfig, ModelConfig
from mantis_core.errors import ModelError
from mantis_core.networks.cost import macs_of, multiply_adds, step_cost, widest, with_wide_encoder
from mantis_core.tasks import class_members
from tests.mantis_core.conftest import SIZE, TASKS, make_config

MEMBERS = class_members(TASKS, 6)


def of(config: ModelConfig) -> tuple[int, int]:
    return macs_of(config, len(TASKS), (SIZE, SIZE), MEMBERS)


def test_a_convolution_costs_its_weights_at_every_position() -> None:
    layer = nn.Conv2d(3, 5, 3, 1, 1)
    assert multiply_adds(lambda: layer(torch.zeros(1, 3, 8, 7))) == 8 * 7 * 5 * 3 * 9


@pytest.mark.parametrize(
    ("layer", "forward"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 2 * 8 * 8 * 6 * 4 * 9),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), 2 * 8 * 8 * 4 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 2 * 8 * 8 * 4 * 6 * 4),
        (nn.Linear(8, 5), 2 * 4 * 8 * 8 * 5),
    ],
)
def test_a_step_costs_a_layer_three_times_and_the_first_one_twice(
    layer: nn.Module, forward: int
) -> None:
    layer, image = layer.to("meta"), torch.empty(2, 4, 8, 8, device="meta")
    assert step_cost(layer, lambda: layer(image).sum()).macs == 2 * forward
    image.requires_grad_()
    assert step_cost(layer, lambda: layer(image).sum()).macs == 3 * forward
    layer.requires_grad_(False)
    assert step_cost(layer, lambda: layer(image).sum()).macs == 2 * forward


def test_a_step_keeps_each_tensor_once_and_no_weight() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).to("meta")
    image = torch.empty(2, 3, 4, 4, device="meta")

    def forward() -> torch.Tensor:
        loss: torch.Tensor = net(image).sum()
        return loss

    floats = 2 * 4 * 4 * (3 + 5)  # the image and the output of the ReLU
    assert step_cost(net, forward).saved_bytes == 4 * floats
    net[0].requires_grad_(False)
    assert step_cost(net, forward).saved_bytes == 4 * 2 * 4 * 4 * 5


def test_a_client_costs_what_its_parts_cost() -> None:
    config = make_config()
    client, detector = of(config)
    positions = (SIZE // 8) ** 2  # of the detector's map
    width, hidden = config.detector.channels, config.detector.hidden
    assert detector == positions * width * config.stem.channels[1] * 9 + hidden * (
        2 * width + len(TASKS)
    )
    wider = config.detector.model_copy(update={"channels": 2 * width})
    grown, more = of(config.model_copy(update={"detector": wider}))
    assert grown - client == more - detector > 0


def test_the_widest_network_within_a_budget_is_found() -> None:
    assert widest(lambda width: width**2, 24**2) == 24
    assert widest(lambda width: width**2, 32**2 - 1) == 28
    assert widest(lambda width: 0, 1) == 4096
    with pytest.raises(ModelError, match="no network of 4 channels"):
        widest(lambda width: width, 3)


def test_a_wide_encoder_costs_what_encoder_and_detector_did() -> None:
    none = ConditioningConfig(kind="none")
    detector = DetectorConfig(channels=32, blocks=2, hidden=8)
    plain = make_config(conditioning=none, single_task=True, detector=detector)
    wide = with_wide_encoder(
        plain.model_copy(update={"wide_encoder": True}), len(TASKS), (SIZE, SIZE), MEMBERS
    )
    budget, _ = of(plain)
    cost, detecting = of(wide)
    assert detecting == 0
    assert wide.encoder.channels > plain.encoder.channels
    next_wider = wide.encoder.model_copy(update={"channels": wide.encoder.channels + 4})
    assert cost <= budget < of(wide.model_copy(update={"encoder": next_wider}))[0]
