"""The bottleneck: quantisation, rate and gradients."""

from functools import partial

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck

from mantis_core.bitstream.coder import to_symbols
from mantis_core.networks.bottleneck import (
    Bottleneck,
    _context_rows,
    _cumulative_logits,
    _weights,
    soft_round,
)
from mantis_core.symbols import (
    CONTEXTS,
    MAX_SYMBOL,
    MOST,
    REACH,
    first_context,
    neighbour_sums,
    pass_of,
)
from tests.mantis_core.bottlenecks import BATCH, CHANNELS, PRIORS, TASKS, batch, build


@pytest.mark.parametrize("prior", PRIORS)
def test_eval_rounds_and_estimates_each_image(prior):
    bottleneck = build(prior).eval()
    latent, mask, primary = batch()
    y_hat, bits = bottleneck(latent, mask, primary)
    assert torch.equal(y_hat, latent.round())
    assert bits.shape == (BATCH,)
    assert (bits > 0).all()


def test_eval_rounds_as_the_coder_does_up_to_the_cap():
    latent = torch.tensor([0.5, 1.5, -2.5, 2.5, 1e9, -1e9, 0.0, -0.5]).view(1, CHANNELS, 1, 2)
    y_hat, _ = build().eval()(latent, torch.ones(1, TASKS).bool(), torch.zeros(1).long())
    assert y_hat.flatten().tolist() == [0, 2, -2, 2, MAX_SYMBOL, -MAX_SYMBOL, 0, 0]
    assert to_symbols(latent.numpy()).ravel().tolist() == y_hat.flatten().tolist()


def test_ste_gives_decoders_the_rounded_latent_and_passes_gradients_through():
    latent, mask, primary = batch()
    latent.requires_grad_()
    y_hat, _ = build(quantizer="ste").train()(latent, mask, primary)
    y_hat.sum().backward()
    assert torch.allclose(y_hat, latent.detach().round(), atol=1e-6)
    assert torch.equal(latent.grad, torch.ones_like(latent))


def test_noise_gives_decoders_a_latent_within_half_a_step():
    latent, mask, primary = batch()
    difference = build(quantizer="noise").train()(latent, mask, primary).y_hat - latent
    assert difference.abs().max() <= 0.5 + 1e-5
    assert difference.std() > 0.2


def test_rounded_gives_the_rate_too_the_rounded_latent_and_a_gradient_through_it():
    latent, mask, primary = batch()
    latent.requires_grad_()
    bottleneck = build(quantizer="rounded")
    y_hat, bits = bottleneck.train()(latent, mask, primary)
    assert torch.allclose(y_hat, latent.detach().round(), atol=1e-6)
    with torch.no_grad():
        expected = bottleneck.eval()(latent, mask, primary).bits
    assert torch.allclose(bits, expected, rtol=1e-4)
    bits.sum().backward()
    assert latent.grad.abs().sum() > 0


def test_soft_rounding_rises_from_integer_to_integer_and_is_steepest_between() -> None:
    whole = torch.arange(-3.0, 4.0)
    torch.testing.assert_close(soft_round(whole), whole)
    torch.testing.assert_close(soft_round(whole + 0.5), whole + 0.5)
    fine = torch.linspace(-2, 2, 4001, requires_grad=True)
    soft = soft_round(fine)
    assert (soft.diff() > 0).all()
    assert (soft - fine).abs().max() < 0.3
    soft.sum().backward()
    slope = fine.grad
    assert slope[(fine.detach() % 1 - 0.5).abs() < 0.01].min() > 2
    assert slope[((fine.detach() + 0.5) % 1 - 0.5).abs() < 0.05].max() < 0.2


def test_with_soft_rounding_the_rate_does_not_pull_at_firm_symbols() -> None:
    latent = torch.tensor([0.52, 1.0]).view(1, 1, 1, 2).repeat(1, CHANNELS, 1, 1)
    pulls = {}
    for quantizer in ("ste", "soft"):
        torch.manual_seed(0)
        bottleneck = build(quantizer=quantizer).train()
        y = latent.repeat(256, 1, 1, 1).requires_grad_(True)
        mask = torch.ones(256, bottleneck.num_tasks, dtype=torch.bool)
        bottleneck(y, mask, torch.zeros(256).long()).bits.sum().backward()
        pulls[quantizer] = y.grad.mean(dim=(0, 1, 2))
    assert pulls["soft"][0].abs() > 1.5 * pulls["ste"][0].abs()
    assert pulls["soft"][1].abs() < 0.2 * pulls["ste"][1].abs()


def test_jitter_flips_symbols_near_their_threshold_in_training_alone():
    latent = torch.tensor([0.45, 0.55, 0.25, 0.75, 1.65, -0.45]).repeat_interleave(1000)
    latent = latent.view(1, 1, 60, 100).repeat(1, CHANNELS, 1, 1).requires_grad_()
    mask, primary = torch.ones(1, TASKS).bool(), torch.zeros(1).long()
    bottleneck = build(quantizer="jitter")
    y_hat, _ = bottleneck.train()(latent, mask, primary)
    own = y_hat[0, 0].detach().view(6, 1000)
    share = [0.375, 0.625, 0.0, 1.0, 0.875]
    for row, (low, expected) in enumerate(zip((0, 0, 0, 0, 1), share, strict=True)):
        assert ((own[row] == low) | (own[row] == low + 1)).all()
        assert (own[row] == low + 1).float().mean() == pytest.approx(expected, abs=0.06)
    assert (own[5] == -1).float().mean() == pytest.approx(0.375, abs=0.06)
    y_hat.sum().backward()
    assert torch.equal(latent.grad, torch.ones_like(latent))
    assert torch.equal(bottleneck.eval()(latent, mask, primary).y_hat, latent.detach().round())


def test_the_shared_density_is_compressais():
    torch.manual_seed(0)
    bottleneck = build("shared").eval()
    reference = EntropyBottleneck(CHANNELS).eval()
    reference.load_state_dict(bottleneck.density.state_dict())
    latent, mask, primary = batch()
    expected = -reference(latent)[1].log2().flatten(1).sum(1)
    assert torch.allclose(bottleneck(latent, mask, primary).bits, expected, rtol=1e-3)


def test_rows_are_those_of_separate_bottlenecks_and_per_task_is_their_mean():
    latent, mask, primary = batch()
    per_task, by_primary = build("per_task").eval(), build("primary").eval()
    by_primary.load_state_dict(per_task.state_dict())
    rows = []
    for row in range(TASKS):
        alone = Bottleneck(CHANNELS, 1, "shared").eval()
        own = slice(row * CHANNELS, (row + 1) * CHANNELS)
        with torch.no_grad():
            for (name, target), (_, source) in zip(
                alone.density.named_parameters(), per_task.density.named_parameters(), strict=True
            ):
                target.copy_(source[own])
                assert name
        ones = torch.ones(BATCH, 1, dtype=torch.bool)
        rows.append(alone._likelihood(latent.round(), None, ones, primary).flatten(1))
    stacked = torch.stack(rows, 1)
    weights = mask.float() / mask.sum(1, keepdim=True)
    mixed = (stacked * weights[:, :, None]).sum(1).clamp(min=1e-9)
    picked = stacked[torch.arange(BATCH), primary].clamp(min=1e-9)
    for bottleneck, likelihood in ((per_task, mixed), (by_primary, picked)):
        expected = -likelihood.log2().sum(1)
        assert torch.allclose(bottleneck(latent, mask, primary).bits, expected, rtol=1e-4)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_trainable_parameter_gets_a_gradient_at_every_step(prior, known):
    bottleneck = build(prior, neighbour_contexts=known).train()
    y, mask, primary = batch()
    mask[:] = torch.tensor([False, True, False])
    bottleneck(y, mask, torch.ones_like(primary)).bits.sum().backward()
    trainable = [p for p in bottleneck.parameters() if p.requires_grad]
    assert len(trainable) == (16 if known else 14)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable)
    if prior != "shared":
        of_row = bottleneck.density.biases[0].grad.view(TASKS, CHANNELS, -1).abs().sum((1, 2))
        assert of_row.gt(0).tolist() == [False, True, False]


def test_gradients_reach_every_row_of_the_active_tasks():
    bottleneck = build("per_task").train()
    y, _, primary = batch()
    bottleneck(y, torch.ones(BATCH, TASKS, dtype=torch.bool), primary).bits.sum().backward()
    for parameter in bottleneck.parameters():
        if parameter.requires_grad:
            assert (parameter.grad.view(TASKS, -1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("side", [-1, 1])
def test_both_tails_keep_a_likelihood_and_a_gradient_that_pulls_inwards(side):
    torch.manual_seed(0)
    bottleneck = Bottleneck(CHANNELS, 1, "shared").eval()
    bits = []
    for distance in (12.0, 16.0):
        y = torch.full((1, CHANNELS, 1, 1), side * distance)
        ones = torch.ones(1, 1).bool()
        bits.append(bottleneck(y, ones, torch.zeros(1).long()).bits.item())
    assert bits[1] > bits[0] + 1
    y = torch.full((1, CHANNELS, 1, 1), side * 12.0, requires_grad=True)
    bottleneck.train()(y, ones, torch.zeros(1).long()).bits.sum().backward()
    assert (side * y.grad > 0).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_autocast_changes_nothing(prior):
    bottleneck = build(prior).eval()
    y, mask, primary = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = bottleneck(y, mask, primary)
    outside = bottleneck(y, mask, primary)
    assert inside.y_hat.dtype == inside.bits.dtype == torch.float32
    assert torch.equal(inside.bits, outside.bits)


def test_an_image_without_a_task_is_refused():
    y, mask, primary = batch()
    mask[2] = False
    with pytest.raises(ValueError, match="never be empty"):
        build("per_task")(y, mask, primary)


def test_untrained_contexts_change_nothing():
    latent, mask, primary = batch()
    plain = build("primary").eval()
    with_contexts = Bottleneck(CHANNELS, TASKS, "primary", neighbour_contexts=True).eval()
    with_contexts.density.load_state_dict(plain.density.state_dict())
    for ours, theirs in zip(
        with_contexts(latent, mask, primary), plain(latent, mask, primary), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_contexts_learn_what_neighbours_tell():
    torch.manual_seed(0)
    smooth = torch.randn(64, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = 3 * smooth.expand(-1, CHANNELS, -1, -1).contiguous()
    mask, primary = torch.ones(64, 1, dtype=torch.bool), torch.zeros(64, dtype=torch.int64)
    bits = {}
    for known in (False, True):
        bottleneck = Bottleneck(CHANNELS, 1, "shared", neighbour_contexts=known)
        optimiser = torch.optim.Adam(bottleneck.parameters(), lr=3e-2)
        for _ in range(200):
            optimiser.zero_grad()
            bottleneck(y, mask, primary).bits.mean().backward()
            optimiser.step()
        bits[known] = bottleneck.eval()(y, mask, primary).bits.mean().item()
    assert bits[True] < 0.9 * bits[False]


def row_after_row(bottleneck, values, half, mask, primary):
    """The likelihood by a loop over images and rows."""
    density, rows = bottleneck.density, bottleneck.num_rows
    likelihood = []
    for i, value in enumerate(values):
        used = {"shared": [0], "primary": [int(primary[i])]}.get(
            bottleneck.prior, mask[i].nonzero()[:, 0].tolist()
        )
        own = 0.5 if half is None else half[i].flatten(1)[:, None]
        masses = []
        for row in used:
            weights = [
                [t.view(rows, CHANNELS, *t.shape[1:])[row] for t in group]
                for group in _weights(density)
            ]
            flat = value.flatten(1)[:, None]
            low, high = (_cumulative_logits(flat + side * own, *weights) for side in (-1, 1))
            sign = torch.where(low + high > 0, -1.0, 1.0)
            masses.append((torch.sigmoid(sign * high) - torch.sigmoid(sign * low)).abs())
        likelihood.append((sum(masses) / len(used)).view_as(value))
    return torch.stack(likelihood)


@pytest.mark.parametrize("most", [None, 2, TASKS])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_one_pass_over_all_rows_gives_what_row_after_row_does(prior, known, most):
    bottleneck = build(prior, neighbour_contexts=known).train()
    bottleneck.most_active = most
    y, mask, primary = batch()
    mask = torch.nn.functional.one_hot(primary, TASKS).bool()
    mask[::2, 0] = True  # one or two rows an image
    trained = [p for p in bottleneck.parameters() if p.requires_grad]
    found = []
    for likelihood in (bottleneck._likelihood, partial(row_after_row, bottleneck)):
        latent = y.clone().requires_grad_()
        values, half = bottleneck._by_context(latent, latent)
        bits = -likelihood(values, half, mask, primary).log2().sum()
        found.append([bits, *torch.autograd.grad(bits, [latent, *trained])])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-4)


def test_contexts_are_those_of_the_coder():
    for height, width in ((1, 1), (4, 5), (7, 2)):
        latent = 3 * torch.randn(2, 3, height, width)
        symbols = latent.round().clamp(-REACH, REACH).numpy().astype(int)
        padded = np.pad(symbols, ((0, 0), (0, 0), (1, 1), (1, 1)))
        own = sum(
            (pass_of(height, width) == number)
            * (first_context(number) + MOST + neighbour_sums(padded, number))
            for number in (1, 2)
        )
        rows = own + CONTEXTS * np.arange(3)[:, None, None]
        assert _context_rows(latent).tolist() == rows.tolist()
