"""Models that are asked: no detector, a stream for each request, what is not asked for stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mantis_core.architecture import (
    ConditioningConfig,
    DetectorConfig,
    ModelConfig,
)
from mantis_core.bitstream.wire import read_stream
from mantis_core.codec.checkpoint import load_client, load_server, save_half, save_model
from mantis_core.codec.mantis import Mantis
from mantis_core.config import Request, Stage2Config
from mantis_core.device.requests import named_tasks
from mantis_core.device.sessions import ClientSession, ServerSession
from mantis_core.errors import ModelError
from mantis_core.networks.detector import NoDetector
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Batch, Problem
from mantis_core.training.asking import Asking
from mantis_core.training.losses import TaskLosses
from mantis_core.training.stage2 import Stage2Recipe
from tests.mantis_core.recipe_checks import train, without_gradient

ASKED = {"requests": "asked", "prior": "request"}


@pytest.fixture(params=["gated", "channels", "film", "none"])
def recipe(
    request: pytest.FixtureRequest,
    problem: Problem,
    stage2_of: Callable[..., Stage2Recipe],
    small_config: Callable[..., ModelConfig],
) -> Stage2Recipe:
    kind = ConditioningConfig(kind=request.param, hidden=8)
    return stage2_of(problem, small_config(conditioning=kind, **ASKED))


@pytest.fixture
def codec(
    problem: Problem, codec_of: Callable[..., Mantis], small_config: Callable[..., ModelConfig]
) -> Mantis:
    """A codec that sends another latent for each request."""
    kind = ConditioningConfig(kind="gated", hidden=8)
    model = codec_of(problem, small_config(conditioning=kind, **ASKED))
    with torch.no_grad():
        conditioning: Any = model.client.conditioning
        torch.manual_seed(0)
        torch.nn.init.normal_(conditioning.film.film.last.weight, std=0.5)
        conditioning.sets.open[0, 1:] = -1.0
        conditioning.sets.open[1, :2] = -1.0
    model.finish()
    return model


def test_a_client_that_is_asked_has_no_detector_and_all_else_is_trained(
    recipe: Stage2Recipe, problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    assert isinstance(recipe.student.client.detector, NoDetector)
    assert recipe.student.joint is None
    assert not {"detection", "joint"} & set(recipe.losses)
    train(recipe, [batch_of(problem, seed=i) for i in range(3)])
    assert without_gradient(recipe.student) == []


def test_each_image_is_coded_for_a_request_that_its_labels_answer(
    problem: Problem, batch_of: Callable[..., Batch], small_config: Callable[..., ModelConfig]
) -> None:
    names = [task.name for task in problem.tasks]
    asking = Asking(Stage2Config(), small_config(**ASKED), names)
    assert asking.asked.tolist() == [*torch.eye(3, dtype=torch.bool).tolist(), [True] * 3]
    batch = batch_of(problem, 2000, classes=(0, 4))
    detected = torch.full((2000, 3), 0.5)
    for training in (True, False):
        asking.train(training)
        found = asking(detected, detected > 0, batch, 0.0)
        assert torch.equal(found.condition, found.mask.float())
        assert torch.equal(found.loss_mask, found.mask & batch.task_mask)
        assert found.loss_mask.any(dim=1).all()
        assert found.forced.all()
        whole = (found.mask.sum(dim=1) == 3).float()
        # Each of its tasks alone, or all of them: that as often as any of the three.
        sizes = 3 / (3 + batch.task_mask.sum(dim=1))
        assert abs(float(whole.mean() - sizes.mean())) < 0.03
    again = asking(detected, detected > 0, batch, 0.7)
    assert torch.equal(again.mask, found.mask)


def test_requests_are_as_frequent_as_their_weights_and_sets_are_asked_together(
    problem: Problem, batch_of: Callable[..., Batch], small_config: Callable[..., ModelConfig]
) -> None:
    names = [task.name for task in problem.tasks]
    requests = (
        Request(tasks=(names[0],), weight=1),
        Request(tasks=(names[0], names[2]), weight=3),
    )
    asking = Asking(Stage2Config(requests=requests), small_config(**ASKED), names)
    batch = replace(
        batch_of(problem, 1),
        image=torch.zeros(4000, 3, 1, 1, dtype=torch.uint8),
        task_mask=torch.ones(4000, 3, dtype=torch.bool),
        row_id=torch.arange(4000),
    )
    for training in (True, False):
        asking.train(training)
        found = asking(batch.task_mask.float(), batch.task_mask, batch, 0.0)
        mask = found.mask
        assert found.shares is not None
        assert found.shares.tolist() == [1, 0, 0.75]
        assert mask[:, 0].all()
        assert not mask[:, 1].any()
        assert abs(float(mask[:, 2].float().mean()) - 0.75) < 0.03
    with pytest.raises(ModelError, match="there is no task 'tool'; the tasks are"):
        Asking(Stage2Config(requests=(Request(tasks=("tool",)),)), small_config(**ASKED), names)


def test_an_image_without_a_task_is_asked_the_more_for_those_it_has(
    problem: Problem, batch_of: Callable[..., Batch], small_config: Callable[..., ModelConfig]
) -> None:
    names = [task.name for task in problem.tasks]
    asking = Asking(Stage2Config(), small_config(**ASKED), names).train()
    truth = torch.tensor([[True, False, True], [False, True, True]]).repeat(2000, 1)
    batch = replace(batch_of(problem, 4000), task_mask=truth)
    torch.manual_seed(0)
    found = asking(truth.float(), truth, batch, 0.0)
    counted = found.loss_mask.sum(dim=0) / truth.sum(dim=0)
    assert found.shares is not None
    # Two of its tasks alone, each once, and three times all: four of five requests name a task.
    torch.testing.assert_close(found.shares, torch.full((3,), 0.8))
    torch.testing.assert_close(counted, found.shares, atol=0.03, rtol=0)


def test_a_rate_weight_means_the_same_whatever_is_asked_for(
    problem: Problem, batch_of: Callable[..., Batch], small_config: Callable[..., ModelConfig]
) -> None:
    names = [task.name for task in problem.tasks]
    requests = (Request(tasks=(names[0],)), Request(tasks=tuple(names[:2]), weight=3))
    asking = Asking(Stage2Config(requests=requests), small_config(**ASKED), names).train()
    few = batch_of(problem, 4000)
    batch = replace(
        few, labels=few.labels.clamp_min(0), task_mask=torch.ones(4000, 3, dtype=torch.bool)
    )
    torch.manual_seed(0)
    found = asking(batch.task_mask.float(), batch.task_mask, batch, 0.0)
    outputs = {
        task.name: torch.log_softmax(torch.randn(4000, task.num_classes + 1), dim=1)
        for task in problem.tasks
    }
    student = {"outputs": {"tasks": outputs, "loss_mask": found.loss_mask, "shares": found.shares}}
    loss = TaskLosses(problem.tasks, not_mine=0.0)(student, {"outputs": {}}, batch)
    own = torch.stack(
        [-outputs[name].gather(1, batch.labels[:, k, None])[:, 0] for k, name in enumerate(names)],
        dim=1,
    )
    of_each_image = (own * found.loss_mask).sum(dim=1)
    assert float(loss) == pytest.approx(float(of_each_image.mean()), rel=0.02)


def test_a_codec_that_sends_the_same_whatever_is_asked_learns_all_tasks_of_an_image(
    problem: Problem, batch_of: Callable[..., Batch], small_config: Callable[..., ModelConfig]
) -> None:
    none = small_config(
        requests="asked", prior="shared", conditioning=ConditioningConfig(kind="none")
    )
    asking = Asking(Stage2Config(), none, [task.name for task in problem.tasks])
    batch = batch_of(problem, 16)
    found = asking(batch.task_mask.float(), batch.task_mask, batch, 0.0)
    assert torch.equal(found.loss_mask, batch.task_mask)
    assert found.shares is None
    assert (found.mask != batch.task_mask).any()


def test_requests_take_streams_of_their_own_and_are_answered_as_in_training(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    image = batch_of(problem, 6).image
    spec = codec.client_codec().stream_spec
    names = [task.name for task in problem.tasks]
    latents = {}
    for asked in (*([name] for name in names), names[:2], names):
        mask = torch.tensor([[name in asked for name in names]]).expand(6, -1)
        sent = codec.encode_in_detail(image, asked)
        answers = codec.decode([each.data for each in sent])
        with torch.no_grad():
            output = codec(normalise(image), mask.float(), mask)
        for row, (each, answer) in enumerate(zip(sent, answers, strict=True)):
            assert answer.tasks == tuple(asked)
            assert each.payload_bytes * 8 <= each.estimated_bits * 1.001 + 16
            for task in problem.tasks:
                if task.is_classification and task.name in asked:
                    best = int(
                        output.tasks.log_p[row, names.index(task.name), : task.num_classes].argmax()
                    )
                    assert answer.labels[task.name] == best
        (first,) = read_stream(sent[0].data, codec.tables(), spec).images
        latents[tuple(asked)] = first.map
    assert not latents[(names[0],)][1:].any()  # channels that its set leaves out
    assert not latents[(names[1],)][:2].any()
    assert latents[tuple(names)].any(axis=(1, 2)).sum() > 1
    rows = codec.tables()
    assert len(rows.cdf) == len(names) + 1
    alone, several = rows.table_for((True, False, False), 0), rows.table_for((True, True, False), 0)
    assert alone.cdf.tobytes() == rows.cdf[0].tobytes()
    assert several.cdf.tobytes() == rows.cdf[-1].tobytes()


def test_a_model_of_one_task_is_asked_for_it_unless_told(
    problem: Problem,
    batch_of: Callable[..., Batch],
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
) -> None:
    alone = replace(problem, tasks=problem.tasks[:1])
    codec = codec_of(alone, small_config(**ASKED))
    image, name = batch_of(problem, 2).image, alone.tasks[0].name
    sent = codec.encode(image)
    assert sent == codec.encode(image, name)
    assert [answer.tasks for answer in codec.decode(sent)] == [(name,)] * 2


def test_a_client_that_is_not_asked_says_so_and_a_session_asks(
    codec: Mantis, problem: Problem, batch_of: Callable[..., Batch], tmp_path: Path
) -> None:
    image, names = batch_of(problem, 3).image, [task.name for task in problem.tasks]
    with pytest.raises(ModelError, match="its server asks for some: name one or more of animals"):
        codec.encode(image)
    save_model(tmp_path / "model", codec, {})
    for half in ("client", "server"):
        save_half(tmp_path / half, tmp_path / "model", half)
    client = ClientSession(load_client(tmp_path / "client"))
    server = ServerSession(load_server(tmp_path / "server"), client.hello)
    told = codec.encode_in_detail(image, names[1])
    messages = client.encode(image, names[1])
    assert [len(message) for message in messages] == [each.session_bytes for each in told]
    assert all(len(each.data) - 10 <= len(m) + 1 for each, m in zip(told, messages, strict=True))
    assert {answer.tasks for answer in server.decode(messages, names[1])} == {(names[1],)}
    with pytest.raises(ModelError, match="name the tasks that are asked for"):
        client.encode(image)


def test_a_model_that_always_detects_cannot_be_asked(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    batch_of: Callable[..., Batch],
) -> None:
    codec = codec_of(problem, small_config(requests="detect"))
    image = batch_of(problem, 2).image
    assert len(codec.encode(image)) == 2
    with pytest.raises(ModelError, match="cannot be asked for some"):
        codec.encode(image, "tools")
    assert codec.ids() != codec_of(problem, small_config()).ids()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"conditioning": {"kind": "attention"}}, "model.conditioning.kind"),
        ({"encoder": {"start": "detector"}}, "model.encoder.start"),
        ({"detector": DetectorConfig(classes=True)}, "model.detector.classes"),
        ({"single_task": True}, "model.single_task"),
    ],
)
def test_what_needs_a_detector_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} needs it"):
        ModelConfig(requests="asked", **changes)


def test_a_registered_model_that_is_asked_is_asked_for_all_unless_some_are_named(
    codec: Mantis, problem: Problem, codec_of: Callable[..., Mantis]
) -> None:
    names = [task.name for task in problem.tasks]
    assert named_tasks(codec.spec.facts, None) == names
    assert named_tasks(codec.spec.facts, f"{names[2]}, {names[0]}") == [names[2], names[0]]
    assert named_tasks(codec_of(problem).spec.facts, None) is None
