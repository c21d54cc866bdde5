"""Shipped groups and the resolution of tasks."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.imagenet import imagenet_groups, imagenet_names, imagenet_wnids
from data_prep.tasks import members_below, resolve_tasks
from tests.data_prep.rows import write_parquet

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


def test_a_parent_has_a_label_of_its_childs_name() -> None:
    group = TaskConfig(name="group", classes=("group/pets", "group/food"))
    pets = TaskConfig(name="pets", classes=("cat", "dog"), parent="group")
    table = resolve_tasks((pets, group), DATA)
    assert [task.parent for task in table.tasks] == ["group", ""]


@pytest.mark.parametrize(
    ("children", "message"),
    [
        ({"pets": "groups"}, "'groups' is no classification; did you mean 'group'"),
        ({"cars": "group"}, r"no label of its parent 'group' has this name \(labels: pets, food\)"),
        ({"pets": "pets"}, "no label of its parent 'pets' has this name"),
        ({"pets": "food", "food": "pets"}, "parents of each other: pets - food"),
    ],
)
def test_a_parent_that_cannot_admit_its_child_is_refused(
    children: dict[str, str], message: str
) -> None:
    tasks = [TaskConfig(name="group", classes=("group/pets", "group/food"))]
    tasks += [
        TaskConfig(name=name, classes=(f"{name}/pets", f"{name}/food"), parent=parent)
        for name, parent in children.items()
    ]
    if children == {"pets": "pets"}:
        tasks[1] = TaskConfig(name="pets", classes=("a", "b"), parent="pets")
    with pytest.raises(DataError, match=message):
        resolve_tasks(tasks, DATA)


def held(root: Path) -> DataConfig:
    """Two sources of class folders: `photos` has cat and dog, `cars` has car and bus."""
    for place in ("photos/cat", "photos/dog", "cars/car", "cars/bus"):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "1.png").touch()
    return DataConfig(
        root=str(root),
        sources=tuple(
            {"kind": "image_folder", "name": name, "path": name, "train": ".", "val": None}
            for name in ("photos", "cars")
        ),
    )


def test_all_classes_are_those_that_the_sources_hold_sorted(tmp_path: Path) -> None:
    data = held(tmp_path)
    every = TaskConfig(name="every", classes="all")
    table = resolve_tasks((every,), data)
    assert table.classes == ("bus", "car", "cat", "dog")
    (tmp_path / "photos/bird").mkdir()
    (tmp_path / "photos/bird/1.png").touch()
    assert resolve_tasks((every,), data).classes == ("bird", *table.classes)
    less = every.model_copy(update={"exclude": ("bird", "bus")})
    assert resolve_tasks((less,), data).classes == ("car", "cat", "dog")


def test_a_task_may_take_all_classes_of_one_source(tmp_path: Path) -> None:
    tasks = [TaskConfig(name=name, classes_from=name) for name in ("photos", "cars")]
    table = resolve_tasks(tasks, held(tmp_path))
    assert [task.labels for task in table.tasks] == [("cat", "dog"), ("bus", "car")]


def test_two_tasks_of_all_classes_are_refused_as_one(tmp_path: Path) -> None:
    one, two = (TaskConfig(name=name, classes="all") for name in ("one", "two"))
    with pytest.raises(DataError, match="'one' and 'two' both have `classes: all`"):
        resolve_tasks((one, two), held(tmp_path))
    fewer = two.model_copy(update={"exclude": ("cat",)})
    assert len(resolve_tasks((one, fewer), held(tmp_path)).tasks) == 2


REST = TaskConfig(name="others", classes="rest")


def test_the_rest_is_what_no_other_task_has_in_imagenets_order() -> None:
    groups = [TaskConfig(name=name, group=name) for name in imagenet_groups()]
    table = resolve_tasks((*groups[:3], REST, *groups[3:]), DATA)
    others = tuple(table.classes[index] for index in table.tasks[3].class_indices)
    assert sorted(table.classes) == list(imagenet_wnids())
    assert others == tuple(sorted(others))
    assert len(others) == 1000 - sum(map(len, imagenet_groups().values()))
    first, *left = others
    less = REST.model_copy(update={"exclude": (first,)})
    table = resolve_tasks((*groups, less), DATA)
    assert table.classes[-len(left) :] == tuple(left)
    assert first not in table.classes


def test_the_rest_beside_a_segmentation_leaves_its_masks_alone() -> None:
    regions = TaskConfig(name="regions", kind="segmentation", labels=("a", "b"))
    table = resolve_tasks((regions, REST), DATA)
    assert [task.num_classes for task in table.tasks] == [2, 1000]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            (TaskConfig(name="every", indices="0-999"), REST),
            "task 'others': `classes: rest` finds nothing left",
        ),
        (
            (TaskConfig(name="every", indices="0-998"), REST),
            r"task 'others' has 1 class\(es\) \(n15075141\); give it at least two",
        ),
        (
            (TaskConfig(name="pets", classes=("n02085620", "cat")), REST),
            "task 'pets' has 'cat', which is no WordNet id of these: list the classes of 'others'",
        ),
        (
            (REST, TaskConfig(name="more", classes="rest")),
            "'others' and 'more' have `classes: rest`: only one task",
        ),
        (
            (
                TaskConfig(name="dogs", group="dogs"),
                REST.model_copy(update={"exclude": ("n02085620",)}),
            ),
            "exclude n02085620 is not among its ids",
        ),
    ],
)
def test_a_rest_that_is_no_set_of_classes_is_refused(
    tasks: tuple[TaskConfig, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        resolve_tasks(tasks, DATA)


def test_all_classes_of_a_source_without_any_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", image=[b"x"], wnid=["cat"])
    data = DataConfig(root=str(tmp_path), sources=({"kind": "parquet", "train": "a.parquet"},))
    with pytest.raises(DataError, match=r"'pets' has 1 class\(es\) \(cat\); give it at least two"):
        resolve_tasks((TaskConfig(name="pets", classes="all"),), data)


def test_a_wordnet_id_outside_imagenet_is_a_class_if_a_source_holds_it(tmp_path: Path) -> None:
    for name in ("n00007846", "n00015388"):
        (tmp_path / f"train/{name}").mkdir(parents=True)
        (tmp_path / f"train/{name}/1.png").touch()
    data = DataConfig(root=str(tmp_path), sources=({"kind": "image_folder", "val": None},))
    beings = TaskConfig(name="beings", classes=("n00007846", "n00015388"))
    assert resolve_tasks((beings,), data).classes == ("n00007846", "n00015388")
    wrong = TaskConfig(name="beings", classes=("n00007846", "n00015389"))
    with pytest.raises(DataError, match="nor ImageNet-1k have n00015389; did you mean 'n00015388'"):
        resolve_tasks((wrong,), data)


def test_accents_are_equal_composed_or_not(tmp_path: Path) -> None:
    for name in ("cafe\u0301", "bar"):
        (tmp_path / f"train/{name}").mkdir(parents=True)
        (tmp_path / f"train/{name}/1.png").touch()
    data = DataConfig(root=str(tmp_path), sources=({"kind": "image_folder", "val": None},))
    (every,) = resolve_tasks((TaskConfig(name="a", classes="all"),), data).tasks
    assert every.labels == ("bar", "caf\u00e9")
    assert TaskConfig(name="a", classes=("cafe\u0301", "b")).classes[0] == "caf\u00e9"


def test_numbers_name_classes_as_their_text() -> None:
    assert TaskConfig(name="a", classes=[0, 1, "2", 3.0]).classes == ("0", "1", "2", "3")
    assert TaskConfig(name="a", classes=[True, False]).classes == ("true", "false")


def test_members_below_a_node_are_found_through_two_parents() -> None:
    edges = [("animal", "pet"), ("animal", "dog"), ("pet", "n02123045"), ("dog", "n02085620")]
    assert members_below("animal", edges) == ("n02085620", "n02123045")
    with pytest.raises(DataError, match="did you mean 'animal"):
        members_below("animals", edges)
