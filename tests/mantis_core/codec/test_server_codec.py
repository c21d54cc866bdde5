"""What the server answers where no decoded task has classes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from mantis_core.codec.mantis import Mantis
from mantis_core.networks.preprocessing import normalise
from mantis_core.networks.server import decided
from tests.mantis_core.conftest import GROUND, TASKS, make_batch, make_codec, make_problem

PROBLEM = replace(make_problem(), tasks=(*TASKS, GROUND))  # one class an image, and a segmentation


@pytest.fixture(scope="module")
def codec() -> Mantis:
    return make_codec(PROBLEM)


def test_a_segmentation_alone_gets_no_class_and_no_nan(codec: Mantis) -> None:
    images = make_batch(PROBLEM).image
    (answer, *_) = codec.decode(codec.encode(images, tasks=["ground"]))
    assert answer.tasks == ("ground",)
    assert (answer.class_index, answer.class_name, answer.class_probability) == (-1, None, 0.0)
    row = answer.to_row()
    assert (row["class_index"], row["class_name"]) == (-1, None)
    assert json.loads(row["answer"], parse_constant=pytest.fail)["class_name"] is None


def test_a_segmentation_beside_other_images_takes_nothing_from_their_classes(codec: Mantis) -> None:
    images = make_batch(PROBLEM).image[:2]
    alone = codec.encode(images, tasks=["ground"])
    named = codec.encode(images, tasks=["animals"])
    mixed = codec.decode([alone[0], named[1]])
    assert mixed[0].class_index == -1
    (expected,) = codec.decode([named[1]])
    assert mixed[1].class_index == expected.class_index in TASKS[0].classes
    assert 0 < mixed[1].class_probability <= 1


def test_in_training_too_a_mask_of_segmentations_decides_no_class(codec: Mantis) -> None:
    images = normalise(make_batch(PROBLEM).image[:3])
    mask = torch.tensor([[False, False, False, True], [True, False, False, True], [False] * 4])
    with torch.no_grad():
        decision = codec(images, mask.float(), mask).decision
    assert decision[0] == decision[2] == -1
    assert int(decision[1]) in TASKS[0].classes


def test_the_best_score_decides_and_no_score_decides_nothing() -> None:
    scores = torch.tensor([[-2.0, -1.0, -math.inf], [-math.inf] * 3])
    assert decided(scores).tolist() == [1, -1]
