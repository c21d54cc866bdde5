"""The server half: decoders, tails, the joint decision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mantis_core.architecture import DecoderConfig
from mantis_core.networks.blocks import SegmentationHead
from mantis_core.networks.client import latent_size
from mantis_core.networks.server import (
    ClassificationTail,
    FeatureDecoder,
    JointDecision,
    Server,
    TaskDecoder,
    _doublings,
)
from mantis_core.tasks import TaskSpec
from mantis_core.teachers.backbone import Backbone
from mantis_core.training.losses import RelativeMSE


def log_probabilities(*rows: list[float]) -> Tensor:
    """log P (B, n + 1) with "not mine" last."""
    return torch.tensor(rows).log()


@pytest.mark.parametrize("side", [2, 4, 8])
def test_the_decoder_reaches_a_split_smaller_or_larger_than_the_latent(side: int) -> None:
    decoder = FeatureDecoder(4, (16, side, side), (4, 4), channels=8, blocks=1)
    feature = decoder(torch.randn(2, 4, 4, 4))
    assert feature.shape == (2, 16, side, side)
    assert (feature >= 0).all()


@pytest.fixture(scope="module")
def features() -> dict[tuple[int, int], dict[str, tuple[int, ...]]]:
    """The shapes of a ResNet-18's features for inputs of many sizes."""
    backbone = Backbone("resnet18").to("meta").eval()
    sides = [(s, s) for s in (12, 20, 32, 36, 40, 48, 50, 56, 64, 72, 96, 100, 128, 200, 224)]
    sizes = [*sides, (100, 150), (96, 40), (20, 200)]
    return {
        size: {
            split: tuple(feature.shape[1:])
            for split, feature in backbone.features(
                torch.zeros(1, 3, *size, device="meta"), ["layer1", "layer2", "layer3"]
            ).items()
        }
        for size in sizes
    }


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("split", ["layer1", "layer2", "layer3"])
def test_the_decoder_rebuilds_a_feature_of_any_input_size(
    split: str, stride: int, features: dict[tuple[int, int], dict[str, tuple[int, int, int]]]
) -> None:
    assert 2 * 3 * len(features) == 108
    for size, shapes in features.items():
        latent = latent_size(size, stride)
        with torch.device("meta"):
            decoder = FeatureDecoder(4, shapes[split], latent, channels=8, blocks=0)
            rebuilt = decoder(torch.zeros(1, 4, *latent))
            assert rebuilt.shape[1:] == shapes[split], size
            other = decoder(torch.zeros(1, 4, latent[0] + 1, latent[1] + 2))
        assert other.shape[2] >= rebuilt.shape[2]
        assert other.shape[3] >= rebuilt.shape[3]


def test_where_sides_divide_the_decoder_has_the_layers_it_always_had() -> None:
    for latent in range(1, 33):
        for target in range(1, 65):
            steps = round(math.log2(target / latent))
            side = latent
            for _ in range(abs(steps)):
                side = 2 * side if steps > 0 else -(-side // 2)
            if side == target:
                assert _doublings((latent, latent), (target, target)) == steps


def relative_error(decoder: FeatureDecoder, feature: Tensor, steps: int = 200) -> float:
    """What is left of a feature (1, C, 4, 4) after learning it by heart."""
    latent = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = RelativeMSE()(decoder(latent), feature)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return float(loss.detach())


def test_a_decoder_reaches_a_feature_with_negative_values_if_it_is_signed() -> None:
    torch.manual_seed(0)
    feature = torch.randn(1, 6, 4, 4)
    signed = FeatureDecoder(8, (6, 4, 4), (4, 4), channels=16, blocks=0, signed=True)
    assert relative_error(signed, feature) < 0.01
    plain = FeatureDecoder(8, (6, 4, 4), (4, 4), channels=16, blocks=0)
    negative = float(feature.clamp_max(0).square().sum() / feature.square().sum())
    assert relative_error(plain, feature, steps=2) >= negative > 0.3


def test_a_task_decoder_is_identity_at_init() -> None:
    deep = torch.rand(2, 16, 3, 3)  # behind a ReLU, as the trunk's output is
    assert torch.equal(TaskDecoder(16, 8)(deep), deep)
    deep = torch.randn(2, 16, 3, 3)
    assert torch.equal(TaskDecoder(16, 8, signed=True)(deep), deep)


def test_a_classification_tail_gives_probabilities_of_labels_and_of_not_mine() -> None:
    out = ClassificationTail(16, 3)(torch.rand(2, 16, 3, 3))
    assert out.shape == (2, 4)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(2))


def test_a_segmentation_head_answers_at_the_inputs_size() -> None:
    head = SegmentationHead(8, 16, 5)
    assert head(torch.rand(2, 8, 4, 4), torch.rand(2, 16, 1, 1), (30, 34)).shape == (2, 5, 30, 34)


def test_joint_decision_equals_a_hand_computed_log_sum_exp() -> None:
    tasks = [
        TaskSpec("a", "classification", 2, (0, 1)),
        TaskSpec("road", "segmentation", 2),
        TaskSpec("b", "classification", 2, (1, 2)),  # class 1 is in both
    ]
    outputs = {
        "a": log_probabilities([0.5, 0.3, 0.2]),
        "road": torch.zeros(1, 2, 4, 4),
        "b": log_probabilities([0.6, 0.1, 0.3]),
    }
    p = torch.tensor([[0.8, 0.9, 0.25]])
    scores = JointDecision(tasks, 3)(outputs, p.log())
    by_hand = [
        math.log(0.8) + math.log(0.5),
        math.log(0.8 * 0.3 + 0.25 * 0.6),
        math.log(0.25) + math.log(0.1),
    ]
    torch.testing.assert_close(scores, torch.tensor([by_hand]))


def test_a_class_of_no_decoded_task_cannot_win() -> None:
    tasks = [TaskSpec("a", "classification", 2, (0, 1)), TaskSpec("b", "classification", 1, (2,))]
    outputs = {"a": log_probabilities([0.5, 0.3, 0.2]), "b": torch.full((1, 2), -math.inf)}
    scores = JointDecision(tasks, 3)(outputs, torch.tensor([[0.0, -math.inf]]))
    assert scores[0, 2] == -math.inf
    torch.testing.assert_close(torch.softmax(scores, 1), torch.tensor([[0.625, 0.375, 0.0]]))


def test_a_tail_that_says_not_mine_loses_to_one_that_does_not() -> None:
    tasks = [TaskSpec("a", "classification", 1, (0,)), TaskSpec("b", "classification", 1, (1,))]
    outputs = {"a": log_probabilities([0.1, 0.9]), "b": log_probabilities([0.7, 0.3])}
    assert JointDecision(tasks, 2)(outputs, torch.zeros(1, 2)).argmax() == 1


def make_server() -> Server:
    tasks = (TaskSpec("a", "classification", 2, (0, 1)), TaskSpec("road", "segmentation", 3))
    trunk = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
    return Server(
        DecoderConfig(channels=8, blocks=0, task_channels=8),
        tasks,
        latent_channels=4,
        latent_size=(4, 4),
        split_shape=(8, 4, 4),
        last_shape=(16, 2, 2),
        trunk=trunk,
    )


def test_the_server_answers_every_task_in_training() -> None:
    outputs = make_server()(torch.randn(2, 4, 4, 4), (32, 32))
    assert {name: tuple(out.shape) for name, out in outputs.items()} == {
        "a": (2, 3),
        "road": (2, 3, 32, 32),
    }


def test_the_trunks_batch_norms_keep_the_teachers_statistics_in_training() -> None:
    server = make_server().train()
    norm = server.trunk[1]
    assert isinstance(norm, nn.BatchNorm2d)
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    server(torch.randn(2, 4, 4, 4), (32, 32))
    assert server.training
    assert not norm.training
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]
