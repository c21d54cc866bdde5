"""Shipped groups and the resolution of tasks."""

from __future__ import annotations

from itertools import combinations

import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.imagenet import imagenet_groups, imagenet_names, imagenet_wnids
from data_prep.tasks import members_below, resolve_tasks

DATA = DataConfig(sources=({"kind": "shapes"},))


def test_every_shipped_class_is_an_imagenet_class_named_once() -> None:
    for name, members in imagenet_groups().items():
        assert set(members) <= set(imagenet_names()), name
        assert len(set(members)) == len(members) >= 10, name


def test_shipped_groups_are_disjoint() -> None:
    for (one, left), (two, right) in combinations(imagenet_groups().items(), 2):
        assert not set(left) & set(right), (one, two)


def test_the_class_table_is_imagenets() -> None:
    wnids = imagenet_wnids()
    assert len(wnids) == 1000
    assert list(wnids) == sorted(wnids)
    assert imagenet_names()[wnids[151]] == "Chihuahua"


def test_dogs_by_group_and_by_indices_are_the_same_classes() -> None:
    table = resolve_tasks(
        (TaskConfig(name="one", group="dogs"), TaskConfig(name="two", indices="151-268")), DATA
    )
    assert table.tasks[0].class_indices == table.tasks[1].class_indices
    assert table.tasks[0].labels[0] == "Chihuahua"
    assert len(table.classes) == table.tasks[0].num_classes == 118


def test_a_class_of_two_tasks_has_one_global_index() -> None:
    table = resolve_tasks(
        (
            TaskConfig(name="a", classes=("x", "y")),
            TaskConfig(name="b", classes=("z", "y", "w"), exclude=("w",)),
        ),
        DATA,
    )
    assert table.classes == ("x", "y", "z")
    assert [task.class_indices for task in table.tasks] == [(0, 1), (2, 1)]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig(name="a", group="dog"), "did you mean 'dogs'"),
        (TaskConfig(name="a", classes=("n02085621", "n02085620")), "did you mean .*n02085620"),
        (TaskConfig(name="a", classes=("x", "x")), "x is named twice"),
        (TaskConfig(name="a", indices=("990-1000",)), "within 0-999"),
        (TaskConfig(name="a", classes_from="forms"), "names no source 'forms'"),
        (TaskConfig(name="edges", classes_from="shapes"), "declares no classes"),
        (TaskConfig(name="outline", classes=("outline/stars", "outline/star")), "outline/star"),
        (TaskConfig(name="a", classes=("x", "y"), exclude=("y",)), "give it at least two"),
        (TaskConfig(name="a", classes=("x", "y"), exclude=("v",)), "exclude v is not among"),
        (TaskConfig(name="region", kind="segmentation", labels=("a", "b")), "mean 'regions'"),
    ],
)
def test_a_mistake_in_a_task_is_named(task: TaskConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve_tasks((task,), DATA)


def test_members_below_a_node_are_found_through_two_parents() -> None:
    edges = [("animal", "pet"), ("animal", "dog"), ("pet", "n02123045"), ("dog", "n02085620")]
    assert members_below("animal", edges) == ("n02085620", "n02123045")
    with pytest.raises(DataError, match="did you mean 'animal"):
        members_below("animals", edges)
