"""The labels of one row, and how a listing is cut into pieces."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from data_prep.config import DataConfig, TaskConfig
from data_prep.manifest import TaskTable
from data_prep.prepare.staging import PIECE_ROWS, indices_of, pieces, task_labels
from data_prep.sources.base import REPEATED, references
from data_prep.tasks import resolve_tasks

TEXT = ("source", "split")


def test_a_row_of_several_classes_has_no_single_class_label() -> None:
    data = DataConfig(sources=({"kind": "shapes"},))
    table: TaskTable = resolve_tasks(
        (
            TaskConfig(name="outline", classes_from="shapes"),
            TaskConfig(name="stroke", classes_from="shapes"),
        ),
        data,
    )
    positions = {class_id: index for index, class_id in enumerate(table.classes)}
    indices = indices_of(["stroke/plus", "outline/square", "other"], positions)
    assert indices == [7, 1]
    assert task_labels(indices, [], table) == ([1, 3], [True, True])


def listing(*runs: tuple[str, str, str, int, int]) -> pa.Table:
    """Runs of rows with the same (source, split, path, position), and so many of each."""
    columns: list[list[str | int]] = [
        [run[place] for run in runs for _ in range(run[4])] for place in range(4)
    ]
    rows = len(columns[0])
    ids, own = [f"row {n}" for n in range(rows)], [[f"class {n % 3}"] for n in range(rows)]
    table = references(ids, own, columns[2], columns[3], list(range(rows)))
    for place, name in enumerate(TEXT):
        table = table.append_column(name, pa.array(columns[place], REPEATED))
    return table


def cuts_row_by_row(table: pa.Table) -> list[int]:
    """Where the pieces of a listing begin, by the rule as it is told."""
    rows = table.select([*TEXT, "path", "position"]).to_pylist()
    cuts = [0]
    for row in range(1, len(rows)):
        size, before, own = row - cuts[-1], rows[row - 1], rows[row]
        other_source = any(own[name] != before[name] for name in TEXT)
        if other_source or size >= 4 * PIECE_ROWS or (size >= PIECE_ROWS and own != before):
            cuts.append(row)
    return cuts


def test_pieces_are_cut_by_the_rule_and_have_plain_text() -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        runs = []
        for number in range(30):
            place = ("one", "train") if number < 12 else ("two", ("train", "val")[number > 20])
            rows = int(random.choice([1, 100, PIECE_ROWS, 3 * PIECE_ROWS, 9 * PIECE_ROWS]))
            runs.append((*place, f"file {number // 3}", number % 3, rows))
        whole = listing(*runs)
        halves = [listing(*runs[:12]), listing(*runs[12:])]  # each with its own dictionaries
        for table in (whole, pa.concat_tables(halves)):
            parts = list(pieces(table))
            sizes = [part.num_rows for part in parts]
            assert [sum(sizes[:n]) for n in range(len(sizes))] == cuts_row_by_row(table)
            assert [part["piece"].unique().to_pylist() for part in parts] == [
                [number] for number in range(len(parts))
            ]
            joined = pa.concat_tables(parts)
            assert joined.select(table.column_names).to_pylist() == table.to_pylist()
            assert joined.schema.field("split").type == pa.string()
            assert joined.schema.field("class_ids").type == pa.list_(pa.string())


def test_an_empty_listing_has_no_piece() -> None:
    assert len(pieces(listing())) == 0
