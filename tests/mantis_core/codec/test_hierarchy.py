"""Tasks with a parent: the server answers a child only where its parent's answer is its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mantis_core.codec.mantis import Mantis
from mantis_core.tasks import Batch, Problem, TaskSpec, parents_first
from tests.mantis_core.conftest import make_codec, make_problem

KIND = TaskSpec("kind", "classification", 2, (4, 5), ("animals", "tools"))


@pytest.fixture
def problem() -> Problem:
    """`kind` says whether `animals` or `tools` is asked; `kitchen` has no parent, and is first."""
    plain = make_problem(single_class=False)
    animals, tools, kitchen, _ = plain.tasks
    children = [replace(task, parent="kind") for task in (animals, tools)]
    return replace(plain, tasks=(kitchen, *children, KIND))


class InTurn(torch.nn.Module):
    """A tail that gives the images of a group the labels 0 and 1 in turn, with P = 0.8."""

    def forward(self, deep: torch.Tensor) -> torch.Tensor:
        p = torch.tensor([[0.8, 0.15, 0.05], [0.15, 0.8, 0.05]])
        return p.log()[torch.arange(len(deep)) % 2]


def codec_of(problem: Problem) -> Mantis:
    torch.manual_seed(0)
    codec = make_codec(problem)
    codec.server.tails["kind"] = InTurn()
    return codec


@pytest.fixture
def codec(problem: Problem) -> Mantis:
    return codec_of(problem)


def test_a_child_is_answered_where_its_parent_says_so(
    codec: Mantis, batch_of: Callable[..., Batch]
) -> None:
    streams = codec.encode(batch_of(make_problem(), 8).image, ["kind", "animals", "tools"])
    codec.server.tails["animals"] = codec.server.tails["tools"] = InTurn()
    for number, answer in enumerate(codec.decode(streams)):
        child = ("animals", "tools")[number % 2]
        assert answer.labels == {"kind": number % 2, child: (number // 2) % 2}
        assert answer.tasks == tuple(n for n in ("animals", "tools", "kind") if n in answer.labels)
        assert answer.label_probability == pytest.approx({"kind": 0.8, child: 0.8 * 0.8})
        assert answer.label_names["kind"] == child


def test_a_child_that_is_asked_for_alone_is_answered(
    codec: Mantis, batch_of: Callable[..., Batch]
) -> None:
    images = batch_of(make_problem(), 4).image
    for answer in codec.decode(codec.encode(images, ["animals", "kitchen"])):
        assert set(answer.labels) == {"animals", "kitchen"}


def test_what_hangs_on_a_child_that_is_left_out_is_left_out(
    problem: Problem, batch_of: Callable[..., Batch]
) -> None:
    kitchen, animals, tools, kind = problem.tasks
    tools = replace(tools, labels=("kitchen", *tools.labels[1:]))
    deep = replace(problem, tasks=(replace(kitchen, parent="tools"), animals, tools, kind))
    codec = codec_of(deep)
    streams = codec.encode(batch_of(make_problem(), 8).image, codec.spec.task_names)
    codec.server.tails["tools"] = InTurn()
    found = [set(answer.labels) for answer in codec.decode(streams)]
    # `tools` is admitted for every other image, and `kitchen` for every other one of these.
    assert found == 2 * [
        {"kind", "animals"},
        {"kind", "tools", "kitchen"},
        {"kind", "animals"},
        {"kind", "tools"},
    ]


def test_parents_come_first_and_others_keep_their_order(problem: Problem) -> None:
    assert parents_first(problem.tasks) == [0, 3, 1, 2]
    assert parents_first(make_problem().tasks) == [0, 1, 2]


def test_a_stream_does_not_depend_on_who_is_whose_parent(problem: Problem) -> None:
    torch.manual_seed(0)
    plain = replace(problem, tasks=tuple(replace(task, parent="") for task in problem.tasks))
    with_parents = make_codec(problem)
    torch.manual_seed(0)
    without = make_codec(plain)
    without.load_state_dict(with_parents.state_dict())
    assert with_parents.ids().stream == without.ids().stream
    assert with_parents.ids().model != without.ids().model  # it answers otherwise
