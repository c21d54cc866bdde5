"""The rows a source lists, and Parquet files with rows to list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.base import REFERENCES, SourceConfig


def listed(source: SourceConfig, root: Path, split: str = "train") -> list[tuple[str, list[str]]]:
    """Returns (source id, class ids) of each row."""
    table = source.listing(str(root), split)
    assert table.schema.equals(REFERENCES)
    return list(zip(table["source_id"].to_pylist(), table["class_ids"].to_pylist(), strict=True))


def write_parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
