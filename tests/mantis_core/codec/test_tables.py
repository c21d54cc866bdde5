"""Integer tables: they match the rate, survive a checkpoint, and code what the density does."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mantis_core.bitstream.coder import TOTAL, to_symbols
from mantis_core.codec.tables import table_set, update_tables
from mantis_core.networks.bottleneck import _context_rows
from mantis_core.symbols import CONTEXTS
from tests.mantis_core.bottlenecks import BATCH, CHANNELS, PRIORS, TASKS, batch, build
from tests.mantis_core.payloads import decode, encode


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_payloads_have_the_estimated_size_and_decode_exactly(prior, known):
    bottleneck = build(prior, neighbour_contexts=known).eval()
    update_tables(bottleneck)
    latent, mask, primary = batch(side=16)
    y_hat, bits = bottleneck(latent, mask, primary)
    for i in range(BATCH):
        table = table_set(bottleneck).table_for(mask[i].numpy(), int(primary[i]))
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
        table_set(bottleneck)
    update_tables(bottleneck)
    tables = table_set(bottleneck)
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
    update_tables(bottleneck)
    first = table_set(bottleneck).digest()
    update_tables(bottleneck)
    assert table_set(bottleneck).digest() == first
    with torch.no_grad():
        bottleneck.density.biases[0].add_(0.5)
    update_tables(bottleneck)
    assert table_set(bottleneck).digest() != first


def test_contexts_of_the_rate_are_those_of_the_coder():
    """A channel's table of a context holds what the estimate says of a symbol there."""
    bottleneck = build("shared", neighbour_contexts=True).eval()
    update_tables(bottleneck)
    latent, mask, primary = batch(side=5, scale=1.0)
    table = table_set(bottleneck).table_for((True,) * TASKS, 0)
    symbols = to_symbols(latent[0].numpy())
    rows = _context_rows(torch.from_numpy(symbols)[None].float())[0]
    bits = 0.0
    for channel, row, column in np.ndindex(symbols.shape):
        own = table.cdf[rows[channel, row, column]]
        entry = symbols[channel, row, column] - table.offsets[channel]
        bits -= np.log2((own[entry + 1] - own[entry]) / TOTAL)
    estimate = bottleneck(latent[:1], mask[:1], primary[:1]).bits.item()
    assert bits == pytest.approx(estimate, rel=5e-3)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_tables_survive_safetensors_into_a_module_with_none_or_with_others(prior, known, tmp_path):
    source = build(prior, neighbour_contexts=known)
    update_tables(source)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    weights = load_file(tmp_path / "weights.safetensors")
    fresh, trained = (build(prior, seed, neighbour_contexts=known) for seed in (1, 2))
    with torch.no_grad():
        trained.density.matrices[0].sub_(1.0)
    update_tables(trained)
    assert table_set(trained).cdf.shape != table_set(source).cdf.shape
    for target in (fresh, trained):
        target.load_state_dict(weights, strict=True)
        assert target.tables_ready
        assert table_set(target).digest() == table_set(source).digest()
    untrained = build(prior, neighbour_contexts=known)
    fresh.load_state_dict(untrained.state_dict(), strict=True)
    assert not fresh.tables_ready


def test_a_density_far_wider_than_a_table_codes_the_rest_by_escapes():
    bottleneck = build("shared").eval()
    with torch.no_grad():
        bottleneck.density.matrices[0].fill_(-9.0)
    update_tables(bottleneck)
    table = table_set(bottleneck).table_for((True,) * TASKS, 0)
    assert table.lengths.max() <= 2050
    symbols = np.arange(-2000, 2000, 100, dtype=np.int32).reshape(CHANNELS, 2, 5)
    decoded = decode(encode(symbols, table), table, symbols.shape)
    assert (decoded == symbols).all()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("prior", PRIORS)
def test_a_table_covers_the_symbols_with_mass_beyond_them_and_no_others(prior, known):
    bottleneck = build(prior, neighbour_contexts=known)
    update_tables(bottleneck)
    edges = torch.arange(-1024, 1026, dtype=torch.float64) - 0.5
    below = bottleneck.cumulative(edges).numpy()
    beyond = (below[..., 1:] > 2.0**-17) & (1 - below[..., :-1] > 2.0**-17)
    for channel, wanted in enumerate(beyond.any((0, 2))):
        symbols = np.flatnonzero(wanted) - 1024
        assert bottleneck.table_offsets[channel] == symbols[0]
        assert bottleneck.table_lengths[channel] == symbols[-1] - symbols[0] + 2


def test_the_density_is_asked_for_little_more_than_the_tables_hold(monkeypatch):
    """So 48 tasks take seconds, and one wide channel makes no array of 2,050 edges a table."""
    bottleneck = build("primary", neighbour_contexts=True)
    sizes = []
    ask = bottleneck.cumulative

    def counted(values, *channels):
        sizes.append(ask(values, *channels).numel())
        return ask(values, *channels)

    monkeypatch.setattr(bottleneck, "cumulative", counted)
    update_tables(bottleneck)
    tables = TASKS * CONTEXTS
    assert sum(sizes) <= tables * (int(bottleneck.table_lengths.sum()) + 2 * 12 * CHANNELS)


def test_weights_that_are_not_finite_make_no_tables():
    bottleneck = build()
    with torch.no_grad():
        bottleneck.density.biases[0][0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        update_tables(bottleneck)
