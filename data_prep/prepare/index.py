"""The index of a preparation: one row for each image, which the driver holds. Reads no images.

It grows with the number of images. So what repeats in it is stored once, what follows from its
columns is left out, and its rows are put in order by their numbers, not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.manifest import TaskTable
from data_prep.sources.base import REPEATED, joined, values_of

HASH_BYTES = 32  # of a sha256
HASH = pa.binary(HASH_BYTES)
ROW = pa.uint32()  # the number of a row


def index_schema(num_masks: int) -> pa.Schema:
    """Returns the columns of an index for tasks with so many segmentation masks.

    `part` is the number of a staging file. `sizes` are the bytes of the image and of each mask,
    which lie one after the other from `offset` in it. `reason` is why a row was refused, `mistake`
    a fault of the settings that it revealed; both are null for a good row.
    """
    return pa.schema(
        [
            ("key", HASH),
            ("content", HASH),
            ("source", REPEATED),
            ("source_id", pa.large_string()),  # 2 GiB hold the names of 50 million images
            ("split", REPEATED),
            ("part", pa.int32()),
            ("offset", pa.int64()),
            ("sizes", pa.list_(pa.int32(), 1 + num_masks)),
            ("class_indices", pa.list_(pa.int32())),
            ("reason", pa.string()),
            ("mistake", pa.string()),
        ]
    )


@dataclass(frozen=True)
class Part:
    """A split: rows of an index in their final order.

    `rows` are their numbers in the index (type ROW). The first one has the id `first_id`, and each
    other one the next.
    """

    index: pa.Table
    rows: pa.Array
    first_id: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def column(self, name: str, chosen: NDArray[np.bool_] | None = None) -> pa.ChunkedArray:
        """Returns a column in the order of the rows; of the chosen rows (num_rows,) if given."""
        rows = self.rows if chosen is None else self.rows.filter(pa.array(chosen))
        return self.index[name].take(rows)


class Tables(Sequence[pa.Table]):
    """Tables of which each is made when it is asked for, so that not all are in memory."""

    def __init__(self, makers: Sequence[Callable[[], pa.Table]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, number: int) -> pa.Table: ...
    @overload
    def __getitem__(self, number: slice) -> Tables: ...
    def __getitem__(self, number: int | slice) -> pa.Table | Tables:
        if isinstance(number, slice):
            return Tables(self._makers[number])
        return self._makers[number]()


def sizes_of(index: pa.Table) -> NDArray[np.int32]:
    """Returns the bytes of each row's image and masks (rows, 1 + masks)."""
    column = joined(index["sizes"])
    sizes: NDArray[np.int32] = column.flatten().to_numpy()
    return sizes.reshape(-1, column.type.list_size)


def with_task(index: pa.Table) -> NDArray[np.bool_]:
    """Returns for each row whether any task is active in it (rows,): it has a class or a mask."""
    classes = pc.list_value_length(joined(index["class_indices"])).to_numpy()
    found: NDArray[np.bool_] = (classes > 0) | (sizes_of(index)[:, 1:] > 0).any(axis=1)
    return found


def active_tasks(part: Part, table: TaskTable) -> list[bool]:
    """Returns for each task whether it is active in any row of a part."""
    values, _ = values_of(part.column("class_indices"))
    present = set(values.unique().to_pylist())
    sizes = sizes_of(part.index)[part.rows.to_numpy()]
    masks = iter((sizes[:, 1:] > 0).any(axis=0).tolist())
    return [
        next(masks) if task.kind == "segmentation" else not present.isdisjoint(task.class_indices)
        for task in table.tasks
    ]


def first_bytes(contents: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Returns the first 8 bytes of each hash as a number (rows,), without a copy."""
    column = joined(contents)
    data = np.frombuffer(column.buffers()[1], np.uint64)
    words = data.reshape(-1, HASH_BYTES // 8)[column.offset : column.offset + len(column)]
    found: NDArray[np.uint64] = words[:, 0]
    return found
