"""What is asked, in every form that callers have, and the tasks that a stream carries."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mantis_core.codec.masks import primary_task, select_mask
from mantis_core.codec.own_answer import ClientAnswers
from mantis_core.device.facts import ClientFacts, facts_from
from mantis_core.device.look import Glimpse, Looker, _Sight
from mantis_core.device.requests import active_tasks, asked_tasks, is_array
from mantis_core.errors import ModelError
from tests.mantis_core.conftest import make_codec, make_config, make_problem

FACTS = make_codec(make_problem(), make_config()).spec.facts


@pytest.mark.parametrize(
    "tasks",
    [
        "tools",
        np.str_("tools"),
        ["tools"],
        ("tools",),
        np.array(["tools"]),
        np.array(["tools"], dtype=object),
        np.array([[False, True, False]]),
        torch.tensor([[False, True, False]]),
        torch.tensor([[False, True, False]] * 2),
    ],
)
def test_tasks_may_be_named_or_given_as_rows(tasks: Any) -> None:
    assert asked_tasks(FACTS, tasks, 2).tolist() == [[False, True, False]] * 2
    assert is_array(tasks) == (getattr(tasks, "ndim", 0) == 2)


@pytest.mark.parametrize(
    "tasks",
    [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(2, 3),
        np.ones((2, 2), bool),
        np.ones(3, bool),
        np.array([1, 0, 1]),
    ],
)
def test_rows_of_another_kind_are_refused_with_what_is_allowed(tasks: Any) -> None:
    with pytest.raises(ModelError, match=r"tasks are .*allowed for 2 images: bool \(2, 3\)"):
        asked_tasks(FACTS, tasks, 2)


@pytest.mark.parametrize("seed", range(30))
def test_a_device_chooses_the_tasks_that_training_chooses_ties_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.choice([0.0, 0.3, 0.5, 0.6, 1.0, rng.random()], size=(20, 5)).astype(np.float32)
    threshold, most = float(rng.choice([0.3, 0.5, 0.55])), int(rng.integers(1, 6))
    known = select_mask(torch.from_numpy(p), torch.tensor(threshold), most)
    assert [active_tasks(row, threshold, most).tolist() for row in p] == known.tolist()
    first = primary_task(torch.from_numpy(p), known).tolist()
    for row, mask, place in zip(p, known.numpy(), first, strict=True):
        assert row[np.where(mask, row, -1.0).argmax()] == row[place]


def test_the_answer_beside_a_latent_is_the_one_that_training_has_seen() -> None:
    codec = make_codec(make_problem(), make_config())
    tasks = codec.spec.tasks
    logits = torch.randn(40, len(codec.spec.classes) + 1) * 4
    logits[0] = 0.0  # all equal
    classes = torch.softmax(logits, dim=1).numpy()
    answers = ClientAnswers(tasks, len(codec.spec.classes))
    client = codec.client_codec()

    class Seen:
        alone = False

        def see(self, images: Any) -> Glimpse:
            return Glimpse(np.full((40, len(tasks)), 0.5, np.float32), classes, None)

    looker = Looker(client.facts, Seen(), 0.5, client.stream_spec)  # type: ignore[arg-type]
    sight = _Sight(looker, np.zeros((40, 3, 8, 8), np.uint8))
    for task in range(len(tasks)):
        known = answers(logits, torch.full((40,), task))
        mine = [sight._beside(row, task) for row in range(40)]
        assert [label for label, _ in mine] == known.label.tolist()
        assert [level for _, level in mine] == known.level.tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ()}, "0 tasks"),
        ({"requests": "always"}, "requests is 'always'"),
        ({"image_size": (0, 32)}, "must be numbers from 1"),
        ({"rate_levels": 1.5}, "must be numbers from 1"),
        ({"sends_answer": "no"}, "must be true or false"),
        ({"labels": (1,)}, "3 tasks, classes of 3, labels of 1"),
    ],
)
def test_facts_that_are_none_are_refused(change: dict[str, Any], said: str) -> None:
    data = FACTS.to_json()
    assert facts_from(data) == FACTS
    with pytest.raises(ValueError, match=said):
        facts_from({**data, **change})
    with pytest.raises(ValueError, match="no facts of a client"):
        facts_from({})
    assert isinstance(FACTS, ClientFacts)
