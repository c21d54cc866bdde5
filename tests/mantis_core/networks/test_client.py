"""The client half."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mantis_core.architecture import ConditioningConfig, DetectorConfig, EncoderConfig, ModelConfig
from mantis_core.codec.masks import coverage_threshold
from mantis_core.errors import ModelError
from mantis_core.networks.blocks import ResidualBlock, group_norm
from mantis_core.networks.client import Client, latent_size
from mantis_core.networks.detector import sides_of, task_logits


@pytest.fixture
def client(small_config: Callable[..., ModelConfig]) -> Client:
    torch.manual_seed(0)
    return Client(small_config(), num_tasks=3).eval()


@pytest.mark.parametrize("kind", ["film", "attention"])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (36, 50)])
def test_latent_is_the_input_over_the_stride_rounded_up(
    small_config: Callable[..., ModelConfig], height: int, width: int, stride: int, kind: str
) -> None:
    encoder = EncoderConfig(channels=8, blocks=1, latent_channels=4, stride=stride)
    config = small_config(encoder=encoder, conditioning=ConditioningConfig(kind=kind))
    client = Client(config, num_tasks=3).eval()
    view = client(torch.randn(2, 3, height, width))
    latent = client.encode(view, torch.sigmoid(view.logits))
    assert view.logits.shape == (2, 3)
    assert latent.shape == (2, 4, -(-height // stride), -(-width // stride))
    assert latent.shape[2:] == latent_size((height, width), stride)


def on_the_grid_of_bfloat16(values: Tensor) -> float:
    """The share of values that bfloat16 holds exactly."""
    return float((values.bfloat16().float() == values.float()).float().mean())


@pytest.mark.parametrize("kind", ["film", "none"])
def test_autocast_rounds_neither_the_latent_nor_the_logits(
    small_config: Callable[..., ModelConfig], kind: str
) -> None:
    client = Client(small_config(conditioning=ConditioningConfig(kind=kind)), num_tasks=3)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        view = client(torch.randn(2, 3, 32, 32))
        latent = client.encode(view, torch.sigmoid(view.logits))
    for values in (view.logits, latent):
        assert values.dtype == torch.float32
        assert on_the_grid_of_bfloat16(values) < 0.5


def test_a_latent_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="latent_channels"):
        EncoderConfig(latent_channels=0)


@pytest.mark.parametrize("kind", ["film", "attention", "features"])
def test_conditioning_is_the_identity_at_init(
    small_config: Callable[..., ModelConfig], kind: str
) -> None:
    client = Client(small_config(conditioning=ConditioningConfig(kind=kind)), num_tasks=3)
    view = client(torch.randn(2, 3, 32, 32))
    latent = client.encode(view, torch.sigmoid(view.logits))
    assert torch.equal(latent, client.encoder(view.stem))


def test_with_trained_film_the_same_image_is_coded_differently_by_task(client: Client) -> None:
    torch.nn.init.normal_(client.conditioning.film.last.weight)
    view = client(torch.randn(1, 3, 32, 32))
    first, second, _ = (client.encode(view, p[None]) for p in torch.eye(3))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("kind", "told"), [("attention", True), ("features", False)])
def test_features_are_attention_that_is_not_told_the_tasks(
    small_config: Callable[..., ModelConfig], kind: str, told: bool
) -> None:
    client = Client(small_config(conditioning=ConditioningConfig(kind=kind)), num_tasks=3)
    for layer in client.conditioning.last:
        torch.nn.init.normal_(layer.weight)
    view = client(torch.randn(1, 3, 32, 32))
    first, second, _ = (client.encode(view, p[None]) for p in torch.eye(3))
    assert torch.equal(first, second) is not told


def test_a_task_is_as_probable_as_its_classes_together() -> None:
    members = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    class_logits, own = torch.randn(5, 5), torch.randn(5, 1)
    p = torch.sigmoid(task_logits(class_logits, own, sides_of(members)))
    of_class = class_logits.softmax(dim=1)
    torch.testing.assert_close(p[:, 0], of_class[:, 0] + of_class[:, 1])
    torch.testing.assert_close(p[:, 1], of_class[:, 1] + of_class[:, 2])
    torch.testing.assert_close(p[:, 2], torch.sigmoid(own[:, 0]))


def test_a_task_of_all_classes_is_what_is_not_none_of_them() -> None:
    members = torch.ones(1, 4, dtype=torch.bool)
    class_logits = torch.randn(5, 5)
    p = torch.sigmoid(task_logits(class_logits, torch.empty(5, 0), sides_of(members)))
    torch.testing.assert_close(p[:, 0], 1 - class_logits.softmax(dim=1)[:, -1])


def test_a_sure_detector_stays_finite() -> None:
    members = torch.eye(3, dtype=torch.bool)
    class_logits = torch.tensor([[200.0, 0, 0, -200]], requires_grad=True)
    logits = task_logits(class_logits, torch.empty(1, 0), sides_of(members))
    torch.testing.assert_close(logits, torch.tensor([[200.0, -200, -200]]), atol=1, rtol=0)
    logits.sum().backward()
    assert torch.isfinite(class_logits.grad).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (36, 50), (8, 8)])
def test_the_detectors_map_holds_what_it_sees_at_half_the_resolution_too(
    small_config: Callable[..., ModelConfig], height: int, width: int
) -> None:
    config = small_config(
        detector=DetectorConfig(channels=8, blocks=0, deep_channels=6, hidden=8),
        conditioning=ConditioningConfig(kind="attention", hidden=8),
    )
    client = Client(config, num_tasks=3)
    view = client(torch.randn(2, 3, height, width))
    size = latent_size((height, width), 8)
    assert view.detected.shape == (2, 8 + 6, *size)
    deep = view.detected[:, 8:, : size[0] // 2 * 2, : size[1] // 2 * 2]
    torch.testing.assert_close(deep[:, :, 0::2], deep[:, :, 1::2])
    latent = client.encode(view, torch.sigmoid(view.logits))
    assert latent.shape == (2, 4, *size)


def test_a_detector_of_classes_gives_both(small_config: Callable[..., ModelConfig]) -> None:
    detector = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)
    config = small_config(detector=detector)
    members = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    view = Client(config, 3, members)(torch.randn(2, 3, 32, 32))
    assert view.logits.shape == (2, 3)
    assert view.class_logits is not None
    assert view.class_logits.shape == (2, 5)
    with pytest.raises(ModelError, match="one class each"):
        Client(config, 3)


def test_without_conditioning_the_probabilities_change_nothing(
    small_config: Callable[..., ModelConfig],
) -> None:
    client = Client(small_config(conditioning=ConditioningConfig(kind="none")), num_tasks=3)
    view = client(torch.randn(1, 3, 32, 32))
    nothing, all_of_them = (client.encode(view, torch.full((1, 3), p)) for p in (0.0, 1.0))
    assert torch.equal(nothing, all_of_them)


def test_an_image_is_encoded_alike_whatever_stands_beside_it(client: Client) -> None:
    images = torch.randn(4, 3, 32, 32)
    client.train()
    p = torch.rand(4, 3)
    together = client.encode(client(images), p)
    alone = [client.encode(client(images[i : i + 1]), p[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 8, 12, 20, 48, 96])
def test_group_norm_fits_any_number_of_channels(channels: int) -> None:
    assert group_norm(channels)(torch.randn(2, channels, 2, 2)).shape == (2, channels, 2, 2)


def test_a_residual_block_of_zero_weights_is_its_skip() -> None:
    block = ResidualBlock(4, 4)
    torch.nn.init.zeros_(block.second.weight)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block(x), torch.relu(x))


def test_the_threshold_keeps_the_coverage_asked_for_and_no_more_than_needed() -> None:
    torch.manual_seed(0)
    p = torch.rand(200, 5) ** 2
    truth = torch.rand(200, 5) < p
    for coverage in (0.5, 0.8, 0.95):
        threshold = coverage_threshold(p, truth, coverage, limit=5)
        best = torch.zeros_like(truth).scatter(1, p.argmax(1, keepdim=True), True)

        def kept(at: float, best: Tensor = best) -> float:
            return float((((p > at) | best) & truth).sum() / truth.sum())

        assert kept(threshold) >= coverage
        assert threshold == 0.5 or kept(threshold * 1.0001) < coverage


def test_the_threshold_is_never_over_a_half_and_stops_at_what_can_be_reached() -> None:
    sure = torch.tensor([[0.9, 0.1]])
    assert coverage_threshold(sure, torch.tensor([[True, False]]), 1.0, limit=2) == 0.5
    p = torch.tensor([[0.9, 0.4, 0.3]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert coverage_threshold(p, everything, 1.0, limit=2) == pytest.approx(0.4, rel=1e-4)
    assert coverage_threshold(p, torch.zeros_like(everything), 0.9, limit=2) == 0.5


def test_task_logits_are_those_of_a_loop_over_tasks() -> None:
    members = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    members[3] = False
    values = torch.randn(6, 8), torch.randn(6, 1)
    weights = torch.randn(6, 5)

    def loop(class_logits: Tensor, own: Tensor) -> Tensor:
        columns = []
        for k, of_task in enumerate(members):
            inside = torch.cat([of_task, of_task.new_zeros(1)])
            mine, others = class_logits[:, inside], class_logits[:, ~inside]
            columns.append(own[:, 0] if k == 3 else mine.logsumexp(1) - others.logsumexp(1))
        return torch.stack(columns, dim=1)

    found = []
    for of_tasks in (loop, lambda *given: task_logits(*given, sides_of(members))):
        given = [value.clone().requires_grad_() for value in values]
        logits = of_tasks(*given)
        (logits * weights).sum().backward()
        found.append((logits.detach(), *(value.grad for value in given)))
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
