"""The index of a preparation: small, and what is read from it is what its rows say."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest

from data_prep.manifest import Task, TaskTable
from data_prep.prepare.index import (
    HASH,
    ROW,
    Part,
    Tables,
    active_tasks,
    first_bytes,
    index_schema,
    with_task,
)
from data_prep.prepare.staging import task_labels

CLASSES = ("cat", "dog", "cow", "hen")
ROWS = [  # (indices of classes, bytes of the image and of two masks)
    ([0], [9, 0, 0]),
    ([], [9, 0, 0]),
    ([1, 0], [9, 0, 0]),
    ([], [9, 4, 0]),
    ([3], [9, 0, 0]),
    ([2], [9, 0, 7]),
]


def table() -> TaskTable:
    def task(name: str, *indices: int) -> Task:
        labels = tuple(CLASSES[each] for each in indices)
        return Task(name, "classification", labels, indices, len(indices))

    ground, sky = (Task(name, "segmentation", ("no", "yes"), (), 2) for name in ("ground", "sky"))
    tasks = (task("pets", 0, 1), ground, task("animals", 1, 2, 3), sky)
    return TaskTable(tasks, CLASSES, CLASSES, ("", "ground", "", "sky"), ((), (), (), ()))


def index(rows: list[tuple[list[int], list[int]]]) -> pa.Table:
    found = [
        {
            "content": hashlib.sha256(b"%d" % number).digest(),
            "source_id": f"row {number}",
            "sizes": sizes,
            "class_indices": classes,
        }
        for number, (classes, sizes) in enumerate(rows)
    ]
    return pa.Table.from_pylist(found, schema=index_schema(2))


def active_by_row(rows: list[tuple[list[int], list[int]]]) -> list[list[bool]]:
    return [task_labels(classes, map(bool, sizes[1:]), table())[1] for classes, sizes in rows]


@pytest.mark.parametrize("first", range(len(ROWS)))
def test_active_tasks_are_those_of_the_rows_one_by_one(first: int) -> None:
    rows = ROWS[first:]
    by_row = active_by_row(rows)
    assert with_task(index(rows)).tolist() == [any(row) for row in by_row]
    chosen = list(range(0, len(rows), 2))
    part = Part(index(rows), pa.array(chosen, ROW), 0)
    assert active_tasks(part, table()) == np.any([by_row[n] for n in chosen], axis=0).tolist()


def test_a_part_has_its_rows_in_their_order() -> None:
    part = Part(index(ROWS), pa.array([4, 0, 5], ROW), 10)
    assert part.num_rows == 3
    assert part.column("source_id").to_pylist() == ["row 4", "row 0", "row 5"]
    chosen = np.array([False, True, True])
    assert part.column("class_indices", chosen).to_pylist() == [[0], [2]]


def test_the_first_bytes_of_a_hash_are_its_number_also_in_a_slice() -> None:
    hashes = [hashlib.sha256(b"%d" % number).digest() for number in range(5)]
    expected = [int.from_bytes(each[:8], "little") for each in hashes]
    column = pa.chunked_array([hashes], HASH)
    assert first_bytes(column).tolist() == expected
    assert first_bytes(column.slice(2, 2)).tolist() == expected[2:4]
    assert first_bytes(pa.chunked_array([hashes[:2], hashes[2:]], HASH)).tolist() == expected


def test_a_table_is_made_when_it_is_asked_for() -> None:
    made = []

    def make(number: int) -> pa.Table:
        made.append(number)
        return pa.table({"number": [number]})

    tables = Tables([lambda number=number: make(number) for number in range(4)])
    assert len(tables) == 4
    assert made == []
    assert [each["number"][0].as_py() for each in tables[1:3]] == [1, 2]
    assert tables[-1]["number"][0].as_py() == 3
    assert made == [1, 2, 3]
