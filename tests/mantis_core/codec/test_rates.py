"""A model of several rates: one training, a level for each image, bytes that are never exceeded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mantis_core.architecture import ConditioningConfig, DetectorConfig, ModelConfig
from mantis_core.bitstream.wire import read_stream
from mantis_core.codec.checkpoint import load_client, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.own_answer import ClientAnswer, Fusion
from mantis_core.config import Stage2Config
from mantis_core.device.requests import Way
from mantis_core.device.sessions import ClientSession, ServerSession
from mantis_core.errors import BudgetError, ModelError
from mantis_core.networks.conditioning import shares_of
from mantis_core.networks.preprocessing import normalise
from mantis_core.rates import BETWEEN, count_levels, weight_at
from mantis_core.tasks import Batch, Problem
from mantis_core.training.loop import Session
from mantis_core.training.stage2 import Stage2Recipe

RATES = (1e-3, 4e-3, 1.6e-2)
LEVELS = 2 * BETWEEN + 1
NAMES_CLASSES = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)


def test_levels_lie_between_the_trained_rates() -> None:
    assert count_levels(1) == 1
    assert count_levels(3) == LEVELS
    weights = [weight_at(RATES, level) for level in range(LEVELS)]
    assert weights[::BETWEEN] == pytest.approx(list(RATES))
    steps = [after / before for before, after in pairwise(weights)]
    assert steps == pytest.approx([4 ** (1 / BETWEEN)] * (LEVELS - 1))
    shares = shares_of(torch.arange(LEVELS), 3)
    assert torch.equal(shares[::BETWEEN], torch.eye(3))
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(LEVELS))
    torch.testing.assert_close(shares[1], torch.tensor([0.75, 0.25, 0.0]))


@pytest.fixture(params=["film", "attention", "none"])
def recipe(
    request: pytest.FixtureRequest,
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
) -> Stage2Recipe:
    model = small_config(
        conditioning=ConditioningConfig(kind=request.param, hidden=8),
        detector=NAMES_CLASSES,
        neighbour_contexts=request.param == "attention",
    )
    return stage2_of(problem, model, rate_weights=RATES)


def steered(codec: Mantis) -> Mantis:
    """A finished codec whose latents shrink from level to level."""
    with torch.no_grad():
        latent = codec.client.encoder.modulated_channels[-1]
        gains = torch.tensor([6.0, 1.0, -0.4])[:, None]
        codec.client.by_level.values[:, -2 * latent : -latent] = gains
        codec.bottleneck.context_log_scale += torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    codec.finish()
    return codec


@pytest.fixture
def codec(recipe: Stage2Recipe) -> Mantis:
    return steered(recipe.student)


def test_an_image_weighs_its_bits_by_its_level_and_all_parameters_learn(
    recipe: Stage2Recipe, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    recipe.train()
    batch = batch_of(problem, 32)
    recipe(batch, 1.0).loss.backward()
    student = recipe.student
    for values in (student.client.by_level.values, student.server.decoder.by_level.values):
        assert (values.grad.abs().sum(dim=1) > 0).all()
    assert (student.bottleneck.context_log_scale.grad.abs().flatten(1).sum(dim=1) > 0).all()
    recipe.eval()
    assert recipe.held_levels == [0, BETWEEN, 2 * BETWEEN]
    for level, weight in zip(recipe.held_levels, RATES, strict=True):
        recipe.level = level
        output = recipe(batch, 1.0)
        terms = sum(value for name, value in output.sums.items() if name.startswith("loss/"))
        with torch.no_grad():
            bits = student(normalise(batch.image), level=torch.full((len(batch),), level)).bits
        torch.testing.assert_close(output.loss, (terms + weight * bits.sum()) / len(batch))


def test_held_back_rows_are_measured_at_each_trained_rate(
    recipe: Stage2Recipe, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    steered(recipe.student)
    session = Session(recipe, Stage2Config(batch_size=8), steps_per_epoch=1, seed=0)
    batches = [batch_of(problem, 5), batch_of(problem, 8, seed=1)]
    figures = session.evaluate(lambda: batches)
    levels = [0, BETWEEN, 2 * BETWEEN]
    for name in ("bits", "top1"):
        each = [figures[f"holdout/level-{level}/{name}"] for level in levels]
        assert figures[f"holdout/{name}"] == pytest.approx(sum(each) / 3)
    images = normalise(torch.cat([batch.image for batch in batches]))
    for level in levels:
        with torch.no_grad():
            bits = recipe.student(images, level=torch.full((13,), level)).bits
        assert figures[f"holdout/level-{level}/bits"] == pytest.approx(float(bits.mean()), rel=1e-4)
    assert figures["holdout/level-0/bits"] > figures["holdout/level-8/bits"]
    assert session.best["holdout/loss"] == figures["holdout/loss"]


def test_streams_hold_their_level_and_are_decoded_at_it(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    image = batch_of(problem, 6).image
    spec = codec.client_codec().stream_spec
    assert spec.rate_levels == LEVELS
    sizes = []
    for level in range(LEVELS):
        sent = codec.encode_in_detail(image, level=level)
        assert [each.rate_level for each in sent] == [level] * 6
        (first,) = read_stream(sent[0].data, codec.tables(), spec).images
        assert first.rate_level == level
        with torch.no_grad():
            output = codec(normalise(image), level=torch.full((6,), level))
        answers = codec.decode([each.data for each in sent])
        assert [a.class_index for a in answers] == output.decision.tolist()
        sizes.append(sum(len(each.data) for each in sent))
        for each in sent:
            assert each.payload_bytes * 8 <= each.estimated_bits * 1.001 + 16
    assert sizes[0] > sizes[BETWEEN] > sizes[-1]
    assert codec.encode(image) == codec.encode(image, level=0)
    mixed = [codec.encode(image[[row]], level=row)[0] for row in range(6)]
    assert len(codec.decode(mixed)) == 6


def test_an_image_passes_the_first_layers_once_however_many_ways_it_is_coded(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    image = batch_of(problem, 3).image
    client = codec.client_codec()
    everything = torch.ones(3, len(problem.tasks), dtype=torch.bool)
    ways = [
        Way(),
        Way(level=BETWEEN),
        Way(exit_confidence=0.0),
        Way(exit_confidence=1.0, level=BETWEEN),
        Way(tasks=everything),
        Way(tasks="tools", level=LEVELS - 1),
        Way(budget=client.budget(60)),
    ]
    alone = [client.encode_each_way(image, [way])[0] for way in ways]
    passes: dict[str, int] = {"stem": 0, "encoder": 0}
    for part in passes:

        def count(*_: object, part: str = part) -> None:
            passes[part] += 1

        getattr(codec.client, part).register_forward_hook(count)
    together = client.encode_each_way(image, ways[:-1])
    assert passes == {"stem": 3, "encoder": 4 * 3}
    together += client.encode_each_way(image, ways[-1:])
    for own, shared in zip(alone, together, strict=True):
        for one, other in zip(own, shared, strict=True):
            assert one.data == other.data
            assert one.rate_level == other.rate_level
            assert one.answered == other.answered
            assert one.session_bytes == other.session_bytes
            assert one.estimated_bits == pytest.approx(other.estimated_bits, rel=1e-5)
    assert all(each.answered for each in together[2])
    assert [e.data for e in together[3]] == [e.data for e in together[1]]


def test_a_budget_is_never_exceeded_and_the_lowest_level_that_fits_is_taken(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    image = batch_of(problem, 4).image
    by_level = [[len(data) for data in codec.encode(image, level=level)] for level in range(LEVELS)]
    budget = (by_level[0][0] + by_level[-1][0]) // 2
    sent = codec.encode_in_detail(image, max_bytes=budget)
    for row, each in enumerate(sent):
        assert len(each.data) <= budget
        if each.rate_level:
            assert by_level[each.rate_level - 1][row] > budget
    assert len({each.rate_level for each in sent} - {0}) >= 1
    assert [e.rate_level for e in codec.encode_in_detail(image, max_bytes=10**6)] == [0] * 4
    least = min(by_level[-1])
    with_answer = codec.encode_in_detail(image, exit_confidence=0.0)
    assert max(len(each.data) for each in with_answer) < least
    answered = codec.encode_in_detail(image, max_bytes=least - 1)
    assert any(each.answered for each in answered)
    with pytest.raises(BudgetError, match="bytes at the smallest rate, and max_bytes is 3"):
        codec.encode(image, max_bytes=3)
    with pytest.raises(BudgetError, match="max_bytes is 3"):
        codec.encode(image, max_bytes=3, exit_confidence=0.0)
    with pytest.raises(BudgetError, match="at the smallest rate"):
        codec.encode(image, "tools", max_bytes=11)


def test_a_level_that_bisection_passes_over_is_found_before_the_image_is_refused(
    codec: Mantis,
    problem: Problem,
    batch_of: Callable[..., Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sizes need not fall from each level to the next."""
    client, image = codec.client_codec(), batch_of(problem, 1).image
    sizes = [90, 80, 70, 60, 50, 30, 41, 40, 35]
    monkeypatch.setattr(client, "_file", lambda coded, _: bytes(sizes[coded.rate_level]))
    found = {most: client.encode_in_detail(image, "tools", max_bytes=most) for most in (30, 45, 75)}
    assert {most: each[0].rate_level for most, each in found.items()} == {30: 5, 45: 5, 75: 2}


def test_fusion_weighs_an_answer_by_the_rate_of_the_latent() -> None:
    draw = torch.Generator().manual_seed(0)
    count, places = 20_000, 4
    log_p = torch.log_softmax(torch.randn(count, places, generator=draw), dim=1)
    answer = ClientAnswer(
        torch.randint(0, 3, (count,), generator=draw), torch.randint(0, 8, (count,), generator=draw)
    )
    shares = shares_of(torch.randint(0, LEVELS, (count,), generator=draw), len(RATES))
    rule = Fusion(len(RATES)).eval()
    rule.fitted_bonus.copy_(torch.tensor([[0.0], [1.0], [3.0]]).expand(3, 8))
    with torch.no_grad():
        fused = rule(log_p, answer, shares).exp()
    truth = torch.multinomial(fused, 1, generator=draw)[:, 0]
    found = Fusion(len(RATES))
    found.calibrate(log_p, answer, truth, shares)
    torch.testing.assert_close(found.fitted_bonus, rule.fitted_bonus, atol=0.4, rtol=0)


@pytest.mark.parametrize("level", [-1, LEVELS, 0.5, True, "low"])
def test_a_level_that_the_model_lacks_is_refused(
    level: object, codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    with pytest.raises(ModelError, match=f"this model has levels 0 to {LEVELS - 1}"):
        codec.encode(batch_of(problem, 1).image, level=level)


def test_a_model_of_one_rate_has_level_0_alone(
    problem: Problem, codec_of: Callable[..., Mantis], batch_of: Callable[..., Batch]
) -> None:
    codec, image = codec_of(problem), batch_of(problem, 1).image
    assert codec.encode(image, level=0) == codec.encode(image)
    with pytest.raises(ModelError, match="this model has one rate"):
        codec.encode(image, level=1)
    with pytest.raises(ModelError, match="not both"):
        codec.encode(image, level=0, max_bytes=100)
    for most in (0, True, 20.5):
        with pytest.raises(ModelError, match="a number of bytes from 1"):
            codec.encode(image, max_bytes=most)


def test_halves_and_sessions_know_the_levels(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    save_model(tmp_path / "whole", codec, {})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "whole", half)
    client, server = load_client(tmp_path / "client"), load_server(tmp_path / "server")
    image = batch_of(problem, 4).image
    sender = ClientSession(client)
    receiver = ServerSession(server, sender.hello)
    for level in (0, 3, LEVELS - 1):
        streams = client.encode(image, level=level)
        assert streams == codec.encode(image, level=level)
        answers = receiver.decode(sender.encode(image, level=level))
        assert [a.labels for a in answers] == [a.labels for a in codec.decode(streams)]
    sizes = [len(message) for message in sender.encode(image, level=LEVELS - 1)]
    budget = max(sizes) + 2
    assert max(len(message) for message in sender.encode(image, max_bytes=budget)) <= budget


@pytest.mark.parametrize(
    "weights", [(1e-3,), (2e-3, 1e-3), (1e-3, 1e-3), (0.0, 1e-3), (1e-3, float("inf"))]
)
def test_weights_that_are_no_levels_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rate_weights"):
        Stage2Config(rate_weights=weights)
