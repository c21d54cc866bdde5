"""Exit heads: a client that is asked answers itself where it is sure, in a few bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mantis_core.architecture import ConditioningConfig, ModelConfig
from mantis_core.bitstream.wire import CodedImage
from mantis_core.codec.checkpoint import load_client, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.config import LossTerm
from mantis_core.device.requests import Budget, Way
from mantis_core.errors import ModelError
from mantis_core.tasks import Batch, Problem
from mantis_core.training.stage2 import Stage2Recipe
from tests.mantis_core.conftest import make_problem
from tests.mantis_core.recipe_checks import train, without_gradient

EXITS = {
    "requests": "asked",
    "prior": "request",
    "exit_heads": True,
    "conditioning": ConditioningConfig(kind="gated", hidden=8),
}
TERMS = {
    "tasks": LossTerm(criterion="TaskLosses"),
    "exits": LossTerm(criterion="ExitAnswers", weight=0.5),
}


@pytest.fixture
def problem() -> Problem:
    """Three classifications and a segmentation, which has no head."""
    return make_problem(single_class=False)


@pytest.fixture
def codec(
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
) -> Mantis:
    """A codec with random weights, whose heads are unsure of some images and sure of others."""
    model: Mantis = stage2_of(problem, small_config(**EXITS), losses=TERMS).student
    with torch.no_grad():
        model.client.encoder.to_latent.weight.mul_(8)
        for parameter in model.client.exits.parameters():  # type: ignore[union-attr]
            torch.nn.init.normal_(parameter, std=0.5)
    model.finish()
    return model


def test_a_head_has_the_labels_of_each_classification(codec: Mantis, problem: Problem) -> None:
    assert codec.spec.exit_labels() == (3, 2, 2, 0)
    assert codec.client_codec().stream_spec.labels == (3, 2, 2, 0)
    assert problem.tasks[3].kind == "segmentation"


def test_a_sure_client_sends_its_label_alone(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    images, name = batch_of(problem, 6).image, problem.tasks[2].name
    every = codec.encode_in_detail(images, name, exit_confidence=0.0)
    none = codec.encode_in_detail(images, name, exit_confidence=1.0)
    plain = codec.encode_in_detail(images, name)
    assert [each.answered for each in every] == [True] * 6
    assert [each.data for each in none] == [each.data for each in plain]
    assert {each.session_bytes for each in every} <= {2, 3}
    assert max(each.session_bytes for each in every) < min(e.session_bytes for e in plain)
    answers = codec.decode([each.data for each in every])
    assert {answer.tasks for answer in answers} == {(name,)}
    assert all(answer.answered and answer.label_probability == {} for answer in answers)
    assert {answer.class_index for answer in answers} == {-1}
    expected = labels_of(codec, images, 2)
    assert [answer.labels[name] for answer in answers] == expected.argmax(1).tolist()
    sure = torch.softmax(expected, 1).max(1).values
    middle = float(sure.median())
    some = codec.encode_in_detail(images, name, exit_confidence=middle)
    assert [each.answered for each in some] == (sure >= middle).tolist()


def labels_of(codec: Mantis, images: torch.Tensor, task: int) -> torch.Tensor:
    """The head's logits, image by image as a client computes them."""
    from mantis_core.networks.preprocessing import normalise

    request = torch.zeros(1, len(codec.spec.tasks))
    request[0, task] = 1.0
    found = []
    with torch.no_grad():
        for image in images:
            view = codec.client.eval()(normalise(image[None]))
            exits = codec.client.code(view, request).exits
            assert exits is not None
            found.append(exits[task])
    return torch.cat(found)


def test_requests_that_no_label_answers_get_a_latent(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    images, names = batch_of(problem, 3).image, [task.name for task in problem.tasks]
    for asked in (names[3], names[:2], names):
        plain, told = (
            codec.encode(images, asked, exit_confidence=confidence) for confidence in (None, 0.0)
        )
        assert plain == told
        assert not any(answer.answered for answer in codec.decode(told))


def test_a_session_carries_answers_and_latents(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    save_model(tmp_path / "model", codec, {})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "model", half)
    name, images = problem.tasks[0].name, batch_of(problem, 6).image
    client = load_client(tmp_path / "client").open(request=name)
    server = load_server(tmp_path / "server").open(client.hello, request=name)
    for confidence in (None, 0.0, 0.7):
        answers = server.decode(client.encode(images, exit_confidence=confidence))
        files = codec.decode(codec.encode(images, name, exit_confidence=confidence))
        assert [a.labels for a in answers] == [f.labels for f in files]
        assert [a.answered for a in answers] == [f.answered for f in files]


def test_an_answer_fits_where_no_latent_does(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    images, name = batch_of(problem, 4).image, problem.tasks[1].name
    streams = codec.client_codec().encode(images, name, max_bytes=13)
    assert max(map(len, streams)) <= 13
    assert all(answer.answered for answer in codec.decode(streams))
    with pytest.raises(ModelError, match="max_bytes is 13"):
        codec.client_codec().encode(images, problem.tasks[3].name, max_bytes=13)


def test_an_exit_keeps_to_the_budget(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    images, name = batch_of(problem, 4).image, problem.tasks[0].name
    client, held = codec.client_codec(), []

    class Never(Budget):
        """A budget that holds whatever has a latent, and no answer alone."""

        def holds(self, image: CodedImage, input_shape: tuple[int, int]) -> bool:
            held.append(image.has_latent)
            return image.has_latent

    way = Way(name, 0.0, None, Never(1000, lambda image, shape: b""))
    (seen,) = client.encode_each_way(images, [way])
    assert False in held
    assert not any(each.answered for each in seen)


def test_heads_are_trained_with_all_else(
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    recipe = stage2_of(problem, small_config(**EXITS), losses=TERMS)
    found = recipe.train()(batch_of(problem, 8), 0.5)
    found.loss.backward()
    assert float(found.sums["loss/exits"]) > 0
    assert without_gradient(recipe) == []


def test_losses_and_heads_go_together(
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
) -> None:
    with pytest.raises(ModelError, match=r"exit_heads: no loss trains them; add .*ExitAnswers"):
        stage2_of(problem, small_config(**EXITS), losses={"tasks": TERMS["tasks"]})
    with pytest.raises(ModelError, match=r"losses.exits: ExitAnswers .* set model.exit_heads=true"):
        stage2_of(problem, small_config(**{**EXITS, "exit_heads": False}), losses=TERMS)
    with pytest.raises(ValidationError, match=r"model.requests=asked"):
        ModelConfig(exit_heads=True)


def test_a_client_without_heads_says_what_it_lacks(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    model = codec_of(problem, small_config(**{**EXITS, "exit_heads": False}))
    assert model.client.exits is None
    model.finish()
    with pytest.raises(ModelError, match=r"train it with model.exit_heads=true"):
        model.encode(batch_of(problem, 1).image, "animals", exit_confidence=0.5)


def test_heads_learn_what_is_asked(
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    recipe = stage2_of(problem, small_config(**EXITS), losses=TERMS)
    batch = batch_of(problem, 16)

    def loss() -> float:
        with torch.no_grad():
            return float(recipe.eval()(batch, 0.5).sums["loss/exits"])

    before = loss()
    train(recipe.train(), [batch] * 30)
    assert loss() < 0.7 * before


def test_the_id_of_streams_changes_with_the_heads(codec: Mantis) -> None:
    before: Any = codec.ids().stream
    with torch.no_grad():
        next(codec.client.exits.parameters()).add_(0.01)  # type: ignore[union-attr]
    codec.load_state_dict(codec.state_dict())
    assert codec.ids().stream != before
