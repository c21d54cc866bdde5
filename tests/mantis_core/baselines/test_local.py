"""The classifier that answers on the device: as costly as the client, and trained like a codec."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mantis_core.architecture import EncoderConfig
from mantis_core.baselines.local import (
    label_sizes,
    local_classifier,
    local_recipe,
    mask_sizes,
)
from mantis_core.errors import ModelError
from mantis_core.folders import load_folder
from mantis_core.networks.cost import macs_of
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import class_members
from tests.mantis_core.conftest import SIZE, make_batch, make_config, make_problem, make_teacher
from tests.mantis_core.recipe_checks import without_gradient

PROBLEM = make_problem()
MODEL = make_config(encoder=EncoderConfig(channels=32, blocks=2, latent_channels=4))


def test_it_costs_no_more_than_the_client_and_nearly_as_much() -> None:
    members = class_members(PROBLEM.tasks, 6)
    budget, _ = macs_of(MODEL, len(PROBLEM.tasks), (SIZE, SIZE), members)
    assert (
        0.7 * budget < local_classifier(MODEL, PROBLEM).cost((SIZE, SIZE))["client_macs"] <= budget
    )


def test_all_of_it_learns_from_labels_and_the_teacher() -> None:
    recipe = local_recipe(MODEL, make_teacher(PROBLEM), PROBLEM, seed=0).train()
    found = recipe(make_batch(PROBLEM), 0.5)
    found.loss.backward()
    assert without_gradient(recipe) == []
    assert {"loss/labels", "loss/distillation", "top1/hits"} <= set(found.sums)


def test_it_is_saved_with_its_cost_and_comes_back(tmp_path: Path) -> None:
    recipe = local_recipe(MODEL, make_teacher(PROBLEM), PROBLEM, seed=3)
    recipe.save(recipe.student.eval(), tmp_path, "local", {"seed": 3})
    tensors, config, meta = load_folder(tmp_path)
    again = local_classifier(MODEL, PROBLEM)
    again.load_state_dict(tensors)
    images = normalise(make_batch(PROBLEM).image)
    with torch.no_grad():
        expected, found = recipe.student(images)["logits"], again.eval()(images)["logits"]
    assert torch.equal(expected, found)
    assert (config, meta["seed"]) == ({"kind": "local"}, 3)
    assert json.loads(json.dumps(meta["client"])) == again.cost((SIZE, SIZE))


@pytest.mark.parametrize("classes", [1, 2, 100, 1000])
def test_an_answer_is_a_stream_of_a_container_and_a_label(classes: int) -> None:
    told = label_sizes(classes - 1, 0, [classes], (64, 64), sure=0.7)
    assert 11 < told.wire_bytes <= 11 + 4
    assert told.session_bytes == told.wire_bytes - 9
    asked = label_sizes(classes - 1, 2, [5, 0, classes, 7], (64, 64))
    assert asked.session_bytes < asked.wire_bytes - 9 + 1  # a file names the task, a reply does not
    assert math.log2(classes) / 8 <= asked.session_bytes - 2 <= math.log2(classes) / 8 + 2
    assert told.payload_bytes == asked.payload_bytes == math.log2(classes) / 8


def test_a_mask_costs_what_its_labels_deflate_to() -> None:
    flat, busy = np.zeros((24, 32), np.int64), np.arange(24 * 32).reshape(24, 32) % 11
    noise = np.random.default_rng(0).integers(0, 11, (24, 32))
    sizes = [mask_sizes(labels) for labels in (flat, busy, noise)]
    assert [s.session_bytes - s.payload_bytes for s in sizes] == [2, 2, 2]
    assert [s.wire_bytes - s.payload_bytes for s in sizes] == [11, 11, 11]
    assert sizes[0].payload_bytes < sizes[1].payload_bytes < sizes[2].payload_bytes
    assert sizes[2].payload_bytes > 24 * 32 * math.log2(11) / 8  # no coder is below the entropy


class TestAsked:
    """Of a server that asks there is a head for each task, of the same multiply-adds in all."""

    problem = make_problem(single_class=False)
    model = make_config(requests="asked")

    def test_there_is_an_answer_to_each_task(self) -> None:
        classifier = local_classifier(self.model, self.problem)
        images = normalise(make_batch(self.problem).image)
        full, coarse = classifier(images), classifier(images, coarse=True)
        assert set(full) == {f"logits/{task.name}" for task in self.problem.tasks}
        for task in self.problem.tasks:
            key, count = f"logits/{task.name}", len(images)
            shape: tuple[int, ...] = (count, task.num_classes)
            small = shape
            if not task.is_classification:
                shape, small = (*shape, SIZE, SIZE), (*shape, SIZE // 8, SIZE // 8)
            assert (full[key].shape, coarse[key].shape) == (shape, small)

    def test_it_costs_what_the_client_that_is_asked_costs(self) -> None:
        budget, _ = macs_of(self.model, len(self.problem.tasks), (SIZE, SIZE), None)
        with_detector, _ = macs_of(MODEL, len(self.problem.tasks), (SIZE, SIZE), None)
        cost = local_classifier(self.model, self.problem).cost((SIZE, SIZE))["client_macs"]
        assert 0.6 * budget < cost <= budget < with_detector

    def test_all_of_it_learns(self) -> None:
        recipe = local_recipe(self.model, make_teacher(self.problem), self.problem, seed=0).train()
        found = recipe(make_batch(self.problem), 0.5)
        found.loss.backward()
        assert without_gradient(recipe) == []
        assert {"loss/labels", "loss/distillation", "top1/hits"} <= set(found.sums)

    def test_images_of_several_labels_need_a_server_that_asks(self) -> None:
        with pytest.raises(ModelError, match=r"`local` names the class.*model\.requests=asked"):
            local_recipe(MODEL, make_teacher(self.problem), self.problem, seed=0)
