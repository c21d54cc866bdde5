"""The client half."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mantis_core.client import Client, ResidualBlock, group_norm, latent_size
from mantis_core.config import ConditioningConfig, EncoderConfig, ModelConfig


@pytest.fixture
def client(small_config: Callable[..., ModelConfig]) -> Client:
    torch.manual_seed(0)
    return Client(small_config(), num_tasks=3).eval()


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 24), (36, 50)])
def test_latent_is_the_input_over_the_stride_rounded_up(
    small_config: Callable[..., ModelConfig], height: int, width: int, stride: int
) -> None:
    encoder = EncoderConfig(channels=8, blocks=1, latent_channels=4, stride=stride)
    client = Client(small_config(encoder=encoder), num_tasks=3).eval()
    stem, logits = client(torch.randn(2, 3, height, width))
    latent = client.encode(stem, torch.sigmoid(logits))
    assert logits.shape == (2, 3)
    assert latent.shape == (2, 4, -(-height // stride), -(-width // stride))
    assert latent.shape[2:] == latent_size((height, width), stride)


def test_encoder_without_modulation_equals_film_at_init(client: Client) -> None:
    stem, logits = client(torch.randn(2, 3, 32, 32))
    assert torch.equal(client.encode(stem, torch.sigmoid(logits)), client.encoder(stem))


def test_with_trained_film_the_same_image_is_coded_differently_by_task(client: Client) -> None:
    torch.nn.init.normal_(client.conditioning.last.weight)
    stem, _ = client(torch.randn(1, 3, 32, 32))
    by_task = [client.encode(stem, p[None]) for p in torch.eye(3)]
    assert not torch.allclose(by_task[0], by_task[1])


def test_without_conditioning_the_probabilities_change_nothing(
    small_config: Callable[..., ModelConfig],
) -> None:
    client = Client(small_config(conditioning=ConditioningConfig(kind="none")), num_tasks=3)
    stem, _ = client(torch.randn(1, 3, 32, 32))
    assert torch.equal(
        client.encode(stem, torch.zeros(1, 3)), client.encode(stem, torch.ones(1, 3))
    )


def test_an_image_is_encoded_alike_whatever_stands_beside_it(client: Client) -> None:
    images = torch.randn(4, 3, 32, 32)
    client.train()
    together = client.encode(*client(images))
    alone = torch.cat([client.encode(*client(image[None])) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 8, 12, 20, 48, 96])
def test_group_norm_fits_any_number_of_channels(channels: int) -> None:
    assert group_norm(channels)(torch.randn(2, channels, 2, 2)).shape == (2, channels, 2, 2)


def test_a_residual_block_of_zero_weights_is_its_skip() -> None:
    block = ResidualBlock(4, 4)
    torch.nn.init.zeros_(block.second.weight)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(block(x), torch.relu(x))
