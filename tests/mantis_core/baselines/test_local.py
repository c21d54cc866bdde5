"""The classifier that answers on the device: as costly as the client, and trained like a codec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mantis_core.architecture import EncoderConfig
from mantis_core.baselines.local import answer_stream, local_classifier, local_recipe
from mantis_core.bitstream.container import StreamSpec, unpack
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
    sent = answer_stream(classes - 1, 0.7, classes, (64, 64))
    spec = StreamSpec(bytes(4), 1, (64, 64), 1, 8, labels=(classes,), version=2)
    assert unpack(sent.data, spec).num_images == 1
    assert 11 < len(sent.data) <= 11 + 4
    assert sent.session_bytes == len(sent.data) - 9
    assert sent.payload_bytes < 3
