"""The bottleneck: quantisation, rate, gradients, and integer tables that match the rate."""

import numpy as np
import pytest
import torch
from compressai.entropy_models import EntropyBottleneck
from safetensors.torch import load_file, save_file

from mantis_core.bottleneck import Bottleneck
from mantis_core.coder import MAX_SYMBOL, TOTAL, to_symbols
from mantis_core.contexts import CONTEXTS, REACH, contexts, pass_of
from tests.mantis_core.payloads import decode, encode

PRIORS = ("shared", "per_task", "primary")
CHANNELS, TASKS, BATCH = 4, 3, 6


def build(prior="per_task", seed=0, **kwargs):
    """A bottleneck whose rows and channels differ, narrow enough for tiny latents."""
    torch.manual_seed(seed)
    bottleneck = Bottleneck(CHANNELS, TASKS, prior, **kwargs)
    with torch.no_grad():
        for parameter in bottleneck.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    return bottleneck


def batch(seed=0, scale=3.0, side=6):
    generator = torch.Generator().manual_seed(seed)
    latent = scale * torch.randn(BATCH, CHANNELS, side, side, generator=generator)
    mask = torch.rand(BATCH, TASKS, generator=generator) < 0.4
    primary = torch.randint(TASKS, (BATCH,), generator=generator)
    mask[torch.arange(BATCH), primary] = True
    return latent, mask, primary


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


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_payloads_have_the_estimated_size_and_decode_exactly(prior, known):
    bottleneck = build(prior, neighbour_contexts=known).eval()
    bottleneck.update_tables()
    latent, mask, primary = batch(side=16)
    y_hat, bits = bottleneck(latent, mask, primary)
    for i in range(BATCH):
        table = bottleneck.tables().table_for(mask[i].numpy(), int(primary[i]))
        payload = encode(to_symbols(latent[i].numpy()), table)
        decoded = decode(payload, table, tuple(latent[i].shape))
        assert torch.equal(torch.from_numpy(decoded).float(), y_hat[i])
        estimate = bits[i].item() / 8
        assert abs(len(payload) - estimate) <= 0.01 * estimate + 8


@pytest.mark.parametrize("prior", PRIORS)
def test_tables_are_integer_counts_that_follow_the_density(prior):
    bottleneck = build(prior).eval()
    assert not bottleneck.tables_ready
    with pytest.raises(RuntimeError, match="update_tables"):
        bottleneck.tables()
    bottleneck.update_tables()
    tables = bottleneck.tables()
    assert tables.cdf.shape[:2] == (bottleneck.num_rows, CHANNELS)
    assert (tables.cdf[..., -1] == TOTAL).all()
    values = torch.arange(-5.0, 6).view(1, 1, 1, -1).expand(1, CHANNELS, 1, -1)
    for row in range(bottleneck.num_rows):
        mask = torch.nn.functional.one_hot(torch.tensor([row]), TASKS).bool()
        likelihood = bottleneck._likelihood(values, None, mask, torch.tensor([row]))[0, :, 0]
        for channel in range(CHANNELS):
            start = -5 - tables.offsets[channel]
            assert start >= 0
            counts = np.diff(tables.cdf[row, channel])[start : start + 11]
            expected = likelihood[channel].detach().numpy()
            assert np.abs(counts / TOTAL - expected).max() < 2e-3


def test_update_tables_follows_later_training_and_is_repeatable():
    bottleneck = build()
    bottleneck.update_tables()
    first = bottleneck.tables().digest()
    bottleneck.update_tables()
    assert bottleneck.tables().digest() == first
    with torch.no_grad():
        bottleneck.density.biases[0].add_(0.5)
    bottleneck.update_tables()
    assert bottleneck.tables().digest() != first


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


def test_contexts_of_the_rate_are_those_of_the_coder():
    """A channel's table of a context holds what the estimate says of a symbol there."""
    bottleneck = build("shared", neighbour_contexts=True).eval()
    bottleneck.update_tables()
    latent, mask, primary = batch(side=5, scale=1.0)
    table = bottleneck.tables().table_for((True,) * TASKS, 0)
    symbols = to_symbols(latent[0].numpy())
    padded = np.pad(symbols.clip(-REACH, REACH), ((0, 0), (1, 1), (1, 1)))
    index = contexts(padded, pass_of(5, 5))
    bits = 0.0
    for channel, row, column in np.ndindex(symbols.shape):
        own = table.cdf[channel * CONTEXTS + index[channel, row, column]]
        entry = symbols[channel, row, column] - table.offsets[channel]
        bits -= np.log2((own[entry + 1] - own[entry]) / TOTAL)
    estimate = bottleneck(latent[:1], mask[:1], primary[:1]).bits.item()
    assert bits == pytest.approx(estimate, rel=5e-3)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_tables_survive_safetensors_into_a_module_with_none_or_with_others(prior, known, tmp_path):
    source = build(prior, neighbour_contexts=known)
    source.update_tables()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    fresh, trained = (build(prior, seed, neighbour_contexts=known) for seed in (1, 2))
    with torch.no_grad():
        trained.density.matrices[0].sub_(1.0)
    trained.update_tables()
    assert trained.tables().cdf.shape != source.tables().cdf.shape
    for target in (fresh, trained):
        target.load_state_dict(weights, strict=True)
        assert target.tables_ready
        assert target.tables().digest() == source.tables().digest()
    untrained = build(prior, neighbour_contexts=known)
    fresh.load_state_dict(untrained.state_dict(), strict=True)
    assert not fresh.tables_ready


def test_a_density_far_wider_than_a_table_codes_the_rest_by_escapes():
    bottleneck = build("shared").eval()
    with torch.no_grad():
        bottleneck.density.matrices[0].fill_(-9.0)
    bottleneck.update_tables()
    table = bottleneck.tables().table_for((True,) * TASKS, 0)
    assert table.lengths.max() <= 2050
    symbols = np.arange(-2000, 2000, 100, dtype=np.int32).reshape(CHANNELS, 2, 5)
    decoded = decode(encode(symbols, table), table, symbols.shape)
    assert (decoded == symbols).all()


def test_weights_that_are_not_finite_make_no_tables():
    bottleneck = build()
    with torch.no_grad():
        bottleneck.density.biases[0][0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        bottleneck.update_tables()
