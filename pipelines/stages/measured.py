"""Keeps the measured answers of each arm, so that an arm added later measures itself alone.

An arm's file is named by a hash of all that decides its answers. It is Parquet, with one row for
each image.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.arms import Arm
from pipelines.stages.spec import StageSpec
from pipelines.training.files import COMPUTED_ON

if TYPE_CHECKING:
    from pipelines.evaluation.split_pass import Evaluated
    from pipelines.storage import Store

FOLDER = "measured"
NOTE = b"mantis"  # key of our entry in the metadata of the file


def measured_file(spec: StageSpec, arm: Arm, specs: Mapping[str, StageSpec]) -> str:
    """Returns the path of an arm's answers below the storage root.

    `spec` is the stage `evaluate`. The path depends on the arm's kind, quality, scale, exit
    confidence and level, on the weights it measures, the data, the batch size, the packages and the
    code. An arm of a given teacher is told by stage 1, whose key holds that teacher.
    """
    decides = {
        "kind": arm.kind,
        "quality": arm.quality,
        "exit_confidence": arm.exit_confidence,
        "weights": specs[arm.stage or "stage1"].key,
        "data": specs["prepare"].key,
        "config": {name: value for name, value in spec.config.items() if name != "arms"},
        "code": spec.code_key,
        **({} if arm.scale is None else {"scale": arm.scale}),
        **({} if arm.level is None else {"level": arm.level}),
    }
    text = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    return f"{FOLDER}/{hashlib.sha256(text.encode()).hexdigest()[:24]}.parquet"


def keep_measured(store: Store, path: str, done: Evaluated, arm: str) -> None:
    """Writes the answers of one arm, with the hardware that computed them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    own = done.answers[arm]
    table = pa.table({name: _column(values) for name, values in own.items() if name != "arm"})
    note = {
        "dtypes": {name: str(own[name].dtype) for name in table.column_names},
        COMPUTED_ON: list(done.computed_on),
    }
    table = table.replace_schema_metadata({NOTE: json.dumps(note).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    store.write_bytes(path, sink.getvalue())


def read_measured(store: Store, path: str, arm: str, around: Evaluated) -> Evaluated | None:
    """Returns the answers of one arm as they were kept; None if there are none.

    `around` holds the tasks and the image size, and no answers.
    """
    import pyarrow.parquet as pq

    if not store.exists(path):
        return None
    table = pq.read_table(io.BytesIO(store.read_bytes(path)))
    note = json.loads(table.schema.metadata[NOTE])
    own = {name: _array(table[name], kind) for name, kind in note["dtypes"].items()}
    return replace(around, answers={arm: own}, computed_on=tuple(note[COMPUTED_ON]))


def _column(values: np.ndarray[Any, Any]) -> Any:
    import pyarrow as pa

    if values.ndim == 1:
        return pa.array(values.tolist() if values.dtype == object else values)
    flat = pa.array(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _array(column: Any, dtype: str) -> np.ndarray[Any, Any]:
    import pyarrow as pa

    if dtype == "object":
        return np.array(column.to_pylist(), dtype=object)
    whole = column.combine_chunks()
    if not pa.types.is_fixed_size_list(whole.type):
        return whole.to_numpy(zero_copy_only=False).astype(dtype)  # type: ignore[no-any-return]
    flat = whole.flatten().to_numpy(zero_copy_only=False).astype(dtype)
    return flat.reshape(-1, whole.type.list_size)  # type: ignore[no-any-return]
