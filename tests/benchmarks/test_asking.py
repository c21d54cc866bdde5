"""benchmarks/asking.py: whose images are asked about, and what counts as right."""

from __future__ import annotations

import pytest

from benchmarks.asking import score, table
from mantis_core.codec.mantis import Mantis
from tests.mantis_core.conftest import make_batch, make_codec, make_problem


@pytest.fixture(scope="module")
def codec() -> Mantis:
    return make_codec(make_problem(single_class=False))


def test_every_task_is_asked_about_on_the_images_that_carry_it(codec: Mantis) -> None:
    batches = [make_batch(make_problem(single_class=False), 6, seed=seed) for seed in (0, 1)]
    rows = table(codec, batches)
    assert [row["task"] for row in rows] == ["animals", "tools", "kitchen", "ground"]
    assert rows[-1]["images"] == 6  # every other one has a mask
    for row in rows:
        for request in ("alone", "all", "detected"):
            assert 0 <= row[request]["figure"] <= 1
            assert 0 < row[request]["payload_bytes"] < row[request]["wire_bytes"]


@pytest.mark.parametrize("task", ["animals", "ground"])
def test_what_was_not_asked_for_counts_as_wrong(codec: Mantis, task: str) -> None:
    batches = [make_batch(make_problem(single_class=False), 6)]
    assert score(codec, batches, task, ["tools"])["figure"] == 0


def test_a_figure_is_the_share_of_right_answers(codec: Mantis) -> None:
    batch = make_batch(make_problem(single_class=False), 6, classes=(0, 1, 2))
    answers = codec.decode(codec.encode(batch.image, ["animals"]))
    right = [a.labels["animals"] == int(batch.labels[i, 0]) for i, a in enumerate(answers)]
    assert score(codec, [batch], "animals", ["animals"])["figure"] == round(sum(right) / 6, 4)
