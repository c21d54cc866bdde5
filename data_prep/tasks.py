"""Resolves the tasks a config names to tables of labels. Holds no images and no lists of classes.

`python -m data_prep.tasks NODE --edges FILE` lists the ImageNet-1k classes below a node of a
hierarchy file (BREEDS "parent child" lines, or CSV with columns parent and child).
imagenet_groups.yaml was made with it.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.compute as pc

from data_prep.config import DataConfig, TaskConfig
from data_prep.errors import DataError
from data_prep.imagenet import imagenet_groups, imagenet_names, imagenet_wnids
from data_prep.manifest import Task, TaskTable
from data_prep.sources.base import listing_of
from data_prep.storage import absolute

SPLITS = ("train", "val")
WORDNET_ID = re.compile(r"n\d{8}")


def resolve_tasks(tasks: Sequence[TaskConfig], data: DataConfig) -> TaskTable:
    """Resolves all tasks to one table, in the order given.

    Raises DataError where there is no task, where two have one name, where a group, class id,
    index, source or mask is unknown, where a task names a class twice, where it has fewer than two
    classes, where two tasks take the same classes by `all`, and where `rest` is no set of classes.
    Only tasks that take all classes of a source list it.
    """
    if not tasks:
        raise DataError("no tasks: name at least one under `tasks`")
    names = [task.name for task in tasks]
    _refuse_repeats(names, "tasks")
    held = HeldClasses(data)
    members = [() if task.classes == "rest" else _class_ids(task, data, held) for task in tasks]
    _refuse_equal(tasks, members)
    _add_the_rest(tasks, members)
    classes = tuple(dict.fromkeys(class_id for ids in members for class_id in ids))
    position = {class_id: index for index, class_id in enumerate(classes)}
    resolved = []
    for task, ids in zip(tasks, members, strict=True):
        labels = task.labels or tuple(class_name(class_id) for class_id in ids)
        indices = tuple(position[class_id] for class_id in ids)
        parent = task.parent or ""
        resolved.append(Task(task.name, task.kind, labels, indices, len(labels), parent))
    _check_parents(resolved)
    is_mask = [task.kind == "segmentation" for task in tasks]
    return TaskTable(
        tasks=tuple(resolved),
        classes=classes,
        class_names=tuple(class_name(class_id) for class_id in classes),
        masks=tuple(t.mask_name if m else "" for t, m in zip(tasks, is_mask, strict=True)),
        ignored=tuple(t.ignore for t in tasks),
    )


def _check_parents(tasks: Sequence[Task]) -> None:
    """Refuses a parent that is no classification with a label of the child's name, and rings."""
    by_name = {task.name: task for task in tasks}
    offered = [task.name for task in tasks if task.kind == "classification"]
    for task in tasks:
        seen = [task.name]
        while task.parent:
            if task.parent not in offered:
                raise DataError(
                    f"task '{task.name}': its parent '{task.parent}' is no classification"
                    f"{did_you_mean(task.parent, offered)} (classifications: {', '.join(offered)})"
                )
            parent = by_name[task.parent]
            if task.name not in parent.labels:
                raise DataError(
                    f"task '{task.name}': no label of its parent '{parent.name}' has this name "
                    f"(labels: {', '.join(parent.labels)})"
                )
            if parent.name in seen:
                raise DataError(f"tasks are parents of each other: {' - '.join(seen)}")
            seen.append(parent.name)
            task = parent


class HeldClasses:
    """The class ids that the sources of a config hold, listed once when they are asked for."""

    def __init__(self, data: DataConfig) -> None:
        self._root = absolute(data.root)
        self._sources = {source.source_name: source for source in data.sources}
        self._found: dict[str, set[str]] = {}

    def of(self, *names: str) -> tuple[str, ...]:
        """Returns the sorted class ids of these sources, of all without names."""
        wanted = names or tuple(self._sources)
        return tuple(sorted(set().union(*map(self._of_one, wanted))))

    def _of_one(self, name: str) -> set[str]:
        if name not in self._found:
            listings = [listing_of(self._sources[name], self._root, split) for split in SPLITS]
            lists = [table["class_ids"].combine_chunks() for table in listings]
            self._found[name] = {
                class_id for ids in lists for class_id in pc.unique(ids.flatten()).to_pylist()
            }
        return self._found[name]


def class_name(class_id: str) -> str:
    """Returns a readable name: of a WordNet id ImageNet's, of `outline/star` the last part."""
    return imagenet_names().get(class_id, class_id.rsplit("/", 1)[-1])


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Returns a hint to end an error message with; it is empty where nothing is similar."""
    near = difflib.get_close_matches(wrong, sorted(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def members_below(node: str, edges: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Returns ImageNet-1k's classes at or below a node of a (parent, child) hierarchy, by index.

    Raises DataError where there are none.
    """
    children: dict[str, list[str]] = {}
    for parent, child in edges:
        children.setdefault(parent, []).append(child)
    reached, waiting = {node}, [node]
    while waiting:
        for child in children.get(waiting.pop(), []):
            if child not in reached:
                reached.add(child)
                waiting.append(child)
    found = tuple(class_id for class_id in imagenet_wnids() if class_id in reached)
    if not found:
        raise DataError(f"no ImageNet-1k class below {node}{did_you_mean(node, children)}")
    return found


def _class_ids(task: TaskConfig, data: DataConfig, held: HeldClasses) -> tuple[str, ...]:
    """Returns the class ids of one task in the order of its labels, () for a segmentation."""
    if task.kind == "segmentation":
        _check_mask(task, data)
        return ()
    if task.group is not None:
        groups = imagenet_groups()
        if task.group not in groups:
            raise DataError(
                f"task '{task.name}': no group '{task.group}'{did_you_mean(task.group, groups)} "
                f"(groups: {', '.join(groups)})"
            )
        ids = groups[task.group]
    elif task.indices:
        wnids = imagenet_wnids()
        ids = tuple(wnids[index] for index in _indices(task))
    elif task.classes_from is not None:
        ids = _of_source(task, data, held)
    elif task.classes == "all":
        ids = held.of()
    else:
        assert task.classes != "rest"
        ids = task.classes
        _check_known(task, task.classes, data, held)
    _refuse_repeats(ids, f"task '{task.name}'")
    return _without_excluded(task, ids)


def _add_the_rest(tasks: Sequence[TaskConfig], members: list[tuple[str, ...]]) -> None:
    """Gives the task of `classes: rest`, if there is one, ImageNet-1k's classes of no other task.

    `members` are the class ids of each task, in place.
    """
    takers = [index for index, task in enumerate(tasks) if task.classes == "rest"]
    if not takers:
        return
    if len(takers) > 1:
        names = " and ".join(f"'{tasks[index].name}'" for index in takers)
        raise DataError(f"tasks {names} have `classes: rest`: only one task may take what is left")
    (place,) = takers
    rest, known = tasks[place], imagenet_names()
    for task, ids in zip(tasks, members, strict=True):
        if strange := [class_id for class_id in ids if class_id not in known]:
            raise DataError(
                f"task '{rest.name}': `classes: rest` needs tasks of ImageNet-1k's classes, and "
                f"task '{task.name}' has {strange[0]!r}, which is no WordNet id of these: list the "
                f"classes of '{rest.name}', or leave '{task.name}' out"
            )
    taken = {class_id for ids in members for class_id in ids}
    left = tuple(class_id for class_id in known if class_id not in taken)
    if not left:
        raise DataError(
            f"task '{rest.name}': `classes: rest` finds nothing left, because the other tasks have "
            "all classes of ImageNet-1k: leave this task out"
        )
    members[place] = _without_excluded(rest, left)


def _without_excluded(task: TaskConfig, ids: tuple[str, ...]) -> tuple[str, ...]:
    for class_id in task.exclude:
        if class_id not in ids:
            hint = did_you_mean(class_id, ids)
            raise DataError(f"task '{task.name}': exclude {class_id} is not among its ids{hint}")
    left = tuple(class_id for class_id in ids if class_id not in task.exclude)
    if len(left) < 2:
        found = f" ({', '.join(left)})" if left else ""
        raise DataError(
            f"task '{task.name}' has {len(left)} class(es){found}; give it at least two"
        )
    return left


def _indices(task: TaskConfig) -> list[int]:
    found: list[int] = []
    for entry in task.indices:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(entry))
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not 0 <= first <= last < len(imagenet_wnids()):
            raise DataError(
                f"task '{task.name}': indices has {entry!r}, no ImageNet-1k index or range; "
                'write 151 or "151-268", within 0-999'
            )
        found += range(first, last + 1)
    return found


def _refuse_equal(tasks: Sequence[TaskConfig], members: Sequence[tuple[str, ...]]) -> None:
    """Refuses two tasks that are one: both have `classes: all` and exclude the same."""
    known: dict[tuple[str, ...], str] = {}
    for task, ids in zip(tasks, members, strict=True):
        if task.classes != "all":
            continue
        other = known.setdefault(ids, task.name)
        if other != task.name:
            raise DataError(
                f"tasks '{other}' and '{task.name}' both have `classes: all`, so they ask the same "
                "question: keep one, or name a source each with classes_from"
            )


def _of_source(task: TaskConfig, data: DataConfig, held: HeldClasses) -> tuple[str, ...]:
    sources = {source.source_name: source for source in data.sources}
    if task.classes_from not in sources:
        raise DataError(
            f"task '{task.name}': classes_from names no source '{task.classes_from}' "
            f"(sources: {', '.join(sources)})"
        )
    source = sources[task.classes_from]
    if not source.declares_classes:
        return held.of(source.source_name)
    ids = source.declared_classes(task.name)
    if not ids:
        raise DataError(
            f"source '{task.classes_from}' declares no classes for a task '{task.name}'; "
            "use its task names, or name the classes by `classes`"
        )
    return ids


def _check_known(
    task: TaskConfig, classes: Sequence[str], data: DataConfig, held: HeldClasses
) -> None:
    """Refuses a class id that is wrong whatever the data holds.

    Wrong is an id in WordNet's form that neither ImageNet-1k nor a source has, and, where a source
    declares classes for this task, one that no source declares. Other ids are checked once the
    sources are listed (prepare/listing.py).
    """
    declared = {
        class_id for source in data.sources for class_id in source.declared_classes(task.name)
    }
    for class_id in classes:
        stray = WORDNET_ID.fullmatch(class_id) and class_id not in imagenet_names()
        if stray and class_id not in held.of():
            hint = did_you_mean(class_id, {*imagenet_wnids(), *held.of()})
            raise DataError(
                f"task '{task.name}': neither the sources nor ImageNet-1k have {class_id}{hint}"
            )
        if declared and class_id not in declared:
            hint = did_you_mean(class_id, declared)
            raise DataError(f"task '{task.name}': no source has class {class_id}{hint}")


def _check_mask(task: TaskConfig, data: DataConfig) -> None:
    offered = {mask for source in data.sources for mask in source.mask_names}
    if task.mask_name not in offered:
        raise DataError(
            f"task '{task.name}': no source has a mask '{task.mask_name}'"
            f"{did_you_mean(task.mask_name, offered)}; they have {sorted(offered)}. Masks are "
            "columns of Parquet files, which the source names in mask_columns"
        )


def _refuse_repeats(names: Sequence[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: {twice[0]} is named twice")


def _read_edges(path: Path) -> list[tuple[str, str]]:
    text = path.read_text("utf-8")
    if path.suffix == ".csv":
        return [(row["parent"], row["child"]) for row in csv.DictReader(text.splitlines())]
    pairs = (line.split() for line in text.splitlines() if line.strip())
    return [(pair[0], pair[1]) for pair in pairs]


def main() -> None:
    """Prints the ImageNet-1k classes below a node as lines of imagenet_groups.yaml."""
    parser = argparse.ArgumentParser(description="ImageNet-1k classes below a hierarchy node")
    parser.add_argument("node")
    parser.add_argument("--edges", type=Path, required=True)
    arguments = parser.parse_args()
    for class_id in members_below(arguments.node, _read_edges(arguments.edges)):
        print(f"  - {class_id}  # {class_name(class_id)}")


if __name__ == "__main__":
    main()
