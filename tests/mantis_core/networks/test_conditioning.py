"""Modulation of the encoder; what holds for every kind is in tests/test_contracts.py."""

from __future__ import annotations

import torch

from mantis_core.networks.blocks import modulate
from mantis_core.networks.conditioning import (
    AttentionConditioning,
    FiLMGenerator,
    Layers,
    NoConditioning,
)

SEEN = torch.rand(1, 5, 2, 2)


def test_film_is_identity_at_init() -> None:
    film = FiLMGenerator(3, (4, 6), hidden=8)
    for gamma_beta, channels in zip(film(torch.rand(5, 3)), (4, 6), strict=True):
        x = torch.randn(5, channels, 2, 2)
        assert torch.equal(modulate(x, gamma_beta), x)


def test_film_differs_by_task_once_its_last_layer_has_weights() -> None:
    film = FiLMGenerator(3, (4,), hidden=8)
    torch.nn.init.normal_(film.last.weight)
    (first, second) = (film(p)[0] for p in torch.eye(3)[:2, None])
    assert first is not None
    assert second is not None
    assert not torch.allclose(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_films_first_step_reaches_its_last_layer() -> None:
    film = FiLMGenerator(3, (4,), hidden=8)
    x = torch.randn(2, 4, 3, 3)
    modulate(x, film(torch.rand(2, 3))[0]).square().sum().backward()
    assert film.last.weight.grad is not None
    assert film.last.weight.grad.abs().sum() > 0
    assert film.last.bias.grad is not None
    assert film.last.bias.grad.abs().sum() > 0


def test_modulation_is_gamma_x_plus_beta_for_each_channel() -> None:
    x = torch.ones(1, 2, 1, 1)
    gamma = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1)
    beta = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1)
    assert modulate(x, (gamma, beta)).flatten().tolist() == [2.5, 2.0]


def test_none_leaves_every_layer_as_it_is_and_has_nothing_to_train() -> None:
    none = NoConditioning(3, Layers((4, 6), (1, 2), 5), hidden=8)
    assert none(torch.rand(1, 3), SEEN) == [None, None]
    assert not list(none.parameters())


def test_attention_modulates_a_position_by_what_the_detector_sees_there() -> None:
    attention = AttentionConditioning(3, Layers((4, 4), (1, 2), 5), hidden=8)
    for layer in attention.last:
        torch.nn.init.normal_(layer.weight)
    p, seen = torch.rand(1, 3), torch.rand(1, 5, 5, 8)
    elsewhere = seen.clone()
    elsewhere[:, :, :2, :4] += 1
    fine, coarse = (
        (first != second).any(dim=1)[0]
        for (first, _), (second, _) in zip(attention(p, seen), attention(p, elsewhere), strict=True)
    )
    assert fine.shape == (5, 8)
    assert fine[:2, :4].all()
    assert not fine[2:].any()
    assert not fine[:, 4:].any()
    assert coarse.tolist() == [[True, True, False, False], [False] * 4, [False] * 4]


def test_attention_keeps_what_it_is_told_of_a_task_under_autocast() -> None:
    attention = AttentionConditioning(3, Layers((4,), (1,), 5), hidden=8)
    assert attention.by_task is not None
    with torch.no_grad():
        attention.first.weight.zero_()
        attention.first.bias.fill_(1.0)  # type: ignore[union-attr]
        attention.by_task.weight.zero_()
        attention.by_task.bias[:8] = 0.001
        attention.by_task.bias[8:] = 0.0
    seen: list[torch.Tensor] = []
    attention.last[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention(torch.rand(1, 3), SEEN)
    (x,) = seen
    torch.testing.assert_close(x.float(), torch.full(x.shape, 1.001), atol=1e-5, rtol=0)
