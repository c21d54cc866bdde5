"""Stage `prepare`: turns images and labels into Parquet shards."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pipelines.stages.spec import CACHE, READER, Inputs, Stage, StageContext, StageSpec

if TYPE_CHECKING:
    from data_prep.manifest import Manifest
    from pipelines.settings.sections import Settings


def identities(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """Returns what the data adds to the key: the resolved tasks and a hash of the sources."""
    table = asdict(inputs.table)
    for task in table["tasks"]:
        if not task["parent"]:  # so that tasks of before have the keys they had
            del task["parent"]
    return {"task_table": table, "data_fingerprint": inputs.data_fingerprint}


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """Prepares the folder with Ray Data. Returns the stage's result."""
    from data_prep.prepare.shards import prepare

    def progress(step: str, done: int, total: int) -> None:
        context.console.progress(spec.name, {"phase": step, "done": done, "total": total})

    manifest = prepare(
        spec.settings.data,
        context.table,
        seed=spec.settings.seed,
        output=spec.folder,
        splits=("train", "val"),
        progress=progress,
    )
    for remark in manifest.remarks:
        context.console.note(f"{spec.name}: {remark}")
    return result_of(manifest)


def result_of(manifest: Manifest) -> dict[str, Any]:
    """Returns the stage's result: fingerprint, rows by split, rejected images, remarks."""
    unassigned = sum(manifest.unassigned.values())
    rows = {name: split.rows for name, split in manifest.splits.items()}
    summary = ", ".join(f"{count} {name}" for name, count in rows.items())
    return {
        "fingerprint": manifest.fingerprint,
        "rows": rows,
        "rejected": manifest.rejected,
        "remarks": list(manifest.remarks),
        "summary": f"{summary}, {manifest.rejected} rejected"
        + (f", {unassigned} of no task" if unassigned else ""),
    }


PREPARE = Stage(
    name="prepare",
    help="Turn images and labels into Parquet shards.",
    after=(),
    reads=("seed", "tasks", "data"),
    leaves_out=("data.root", *READER, *CACHE),
    identities=identities,
    code=("data_prep.prepare.shards", "data_prep.sources.kinds", "data_prep.tasks"),
    run=run,
)
