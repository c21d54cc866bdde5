"""Early exit: images whose class the detector is sure of are answered by the client."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mantis_core.architecture import DetectorConfig, ModelConfig
from mantis_core.bitstream.wire import read_stream
from mantis_core.codec.mantis import Mantis
from mantis_core.errors import ModelError
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Problem
from tests.mantis_core.conftest import GROUND, TASKS, make_problem

DETECTOR = DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)


@pytest.fixture
def codec(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
) -> Mantis:
    return codec_of(problem, small_config(detector=DETECTOR))


@pytest.fixture
def pixels() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (12, 3, 32, 32), generator=draw, dtype=torch.uint8)


def named(codec: Mantis, pixels: torch.Tensor) -> tuple[list[float], list[int]]:
    """The detector's most probable class of each image and how sure it is."""
    sure, index = [], []
    with torch.no_grad():
        for image in pixels:
            logits = codec.client(normalise(image[None])).class_logits
            assert logits is not None
            best = torch.softmax(logits, dim=1)[0, :-1].max(dim=0)
            sure.append(float(best.values))
            index.append(int(best.indices))
    return sure, index


def test_the_sure_ones_are_answered_with_the_detectors_class(
    codec: Mantis, pixels: torch.Tensor
) -> None:
    sure, index = named(codec, pixels)
    middle = sorted(sure)[6]
    encoded = codec.encode_in_detail(pixels, exit_confidence=middle)
    assert [each.answered for each in encoded] == [value >= middle for value in sure]
    answers = codec.decode([each.data for each in encoded])
    for sent, answer, value, expected in zip(encoded, answers, sure, index, strict=True):
        assert answer.answered == sent.answered
        if not answer.answered:
            continue
        assert answer.class_index == expected
        assert answer.class_name == codec.spec.class_names[expected]
        (task,) = answer.tasks
        own = codec.spec.tasks[codec.spec.task_names.index(task)]
        assert own.classes[answer.labels[task]] == expected
        assert own.labels[answer.labels[task]] == answer.label_names[task]
        assert abs(math.log2(answer.class_probability) - math.log2(value)) <= 0.26
        assert sent.payload_bytes < 1
        assert answer.payload_bytes < 1
        assert sent.estimated_bits == 0


def test_the_others_are_sent_as_without_it(codec: Mantis, pixels: torch.Tensor) -> None:
    plain = codec.encode(pixels)
    assert codec.encode(pixels, exit_confidence=1.0) == plain
    middle = sorted(named(codec, pixels)[0])[6]
    for sent, before in zip(
        codec.encode_in_detail(pixels, exit_confidence=middle), plain, strict=True
    ):
        assert sent.answered or sent.data == before


def test_what_was_asked_for_is_sent_and_not_answered(codec: Mantis, pixels: torch.Tensor) -> None:
    asked = codec.encode(pixels, ["tools"], exit_confidence=0.0)
    assert asked == codec.encode(pixels, ["tools"])


def test_answers_take_no_decoding_and_stand_in_one_stream_with_others(
    codec: Mantis, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = codec.client_codec(), codec.server_codec()
    middle = sorted(named(codec, pixels)[0])[6]
    together = client.write_together(list(client.look(pixels, exit_confidence=middle)))
    found = read_stream(together, codec.tables(), client.stream_spec)
    answers = server.decode([together])
    assert [a.answered for a in answers] == [i.label is not None for i in found.images]
    assert {a.answered for a in answers} == {True, False}
    monkeypatch.setattr(server, "_decode_group", None)
    assert all(a.answered for a in server.decode(client.encode(pixels, exit_confidence=0.0)))


def test_a_class_of_two_tasks_is_answered_for_the_more_probable(
    codec: Mantis, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`knife` is a tool and kitchenware."""

    def sees(images: torch.Tensor) -> object:
        view = forward(images)
        classes = torch.full_like(view.class_logits, -9.0)
        classes[:, 4] = 9.0
        return view._replace(class_logits=classes, logits=torch.tensor([[-9.0, -1.0, 1.0]]))

    forward = codec.client.forward
    monkeypatch.setattr(codec.client, "forward", sees)
    (answer,) = codec.decode(codec.encode(pixels[:1], exit_confidence=0.9))
    assert (answer.tasks, answer.label_names) == (("kitchen",), {"kitchen": "knife"})


@pytest.mark.parametrize("confidence", [-0.1, 1.5, math.nan])
def test_a_confidence_is_a_probability(
    codec: Mantis, pixels: torch.Tensor, confidence: float
) -> None:
    with pytest.raises(ModelError, match="exit_confidence"):
        codec.encode(pixels, exit_confidence=confidence)


def test_a_detector_of_tasks_alone_cannot_answer(
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    pixels: torch.Tensor,
) -> None:
    codec = codec_of(problem, small_config())
    with pytest.raises(ModelError, match=r"model\.detector\.classes=true"):
        codec.encode(pixels, exit_confidence=0.5)


def test_an_image_with_something_to_segment_is_sent(
    codec_of: Callable[..., Mantis], small_config: Callable[..., ModelConfig], pixels: torch.Tensor
) -> None:
    mixed = replace(make_problem(), tasks=(*TASKS, GROUND))
    codec = codec_of(mixed, small_config(detector=DETECTOR))
    ground = codec.spec.task_names.index("ground")
    with torch.no_grad():
        own = codec.client.detector.mlp[-1]
        own.bias[-1] = 9.0  # the logit of the task without classes
        codec.finish()
    assert all(sent.mask[ground] for sent in codec.encode_in_detail(pixels, exit_confidence=0.0))
    with torch.no_grad():
        own.bias[-1] = -9.0
        codec.finish()
    assert all(sent.answered for sent in codec.encode_in_detail(pixels, exit_confidence=0.0))
