"""Labels to class ids: a whole column gives what its labels give one by one."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from data_prep.errors import DataError
from data_prep.sources.class_ids import Labels

COLUMNS = {
    "numbers": pa.array([3, 1, None, 3, 7, 7]),
    "floats": pa.array([1.0, math.nan, 0.5, None, 1.0]),
    "words": pa.array(["b", "a", None, "b", ""]),
    "truths": pa.array([True, None, False, True]),
    "bytes": pa.array([b"a", b"\xff", b"a"]),
    "lists": pa.array([[1, 3], [], None, [3, 3]]),
    "categories": pa.DictionaryArray.from_arrays([1, 0, None, 1], ["x", "y", "never"]),
    "part": pa.array([9, 9, 3, 1, 9]).slice(2, 2),
    "nothing": pa.nulls(3),
    "no rows": pa.array([], pa.int64()),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("mapping", [None, {"1": "one", "a": "A", "true": "yes", "x": "X"}])
def test_a_column_has_the_class_ids_of_its_labels(name: str, mapping: Any) -> None:
    column = COLUMNS[name]
    whole, each = Labels(mapping), Labels(mapping)
    expected = [each.class_ids(label, "here") for label in column.to_pylist()]
    assert whole.column(column, "here", None).to_pylist() == expected
    assert whole.unknown.most_common() == each.unknown.most_common()
    assert whole.note() == each.note()


def test_the_first_wrong_index_of_a_column_is_named() -> None:
    labels = Labels("imagenet")
    assert labels.column(pa.array([0, -1, -1]), "here", None).to_pylist() == [["n01440764"], [], []]
    assert labels.unknown == {"-1": 2}
    with pytest.raises(DataError, match="here: label 5000 is no ImageNet-1k index"):
        labels.column(pa.array([0, 5000, 1000]), "here", None)
