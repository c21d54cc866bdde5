"""Describes prepared data to MLflow: one dataset for each split, logged as inputs of runs.

A dataset is a name, a digest, a source, a schema and a profile. No image goes to MLflow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlflow.entities import Dataset as Dataset
from mlflow.entities import DatasetInput, InputTag, Run

from pipelines.tracking.runs import Tracker

if TYPE_CHECKING:
    from data_prep.manifest import Manifest

CONTEXTS = {"train": "training", "holdout": "validation", "val": "evaluation"}
"""MLflow's name for the use of each split."""
CONTEXT_TAG = "mlflow.data.context"
DIGEST_LENGTH = 12
_MASKS = {"segmentation": ", masks"}


def datasets(manifest: Manifest, folder: str) -> dict[str, Dataset]:
    """Returns the dataset of each split of a prepared folder, by the name of the split.

    The digest covers the shards of the split and the tasks. So two sets that share their `val`
    images and tasks have one `val` dataset, and figures on it may be compared.
    """
    address = without_secrets(folder)
    scheme = urlsplit(address).scheme or "local"
    name = "+".join(source.name for source in manifest.sources) or "images"
    return {
        split: Dataset(
            name=f"{name[:400]}-{split}",
            digest=_digest(manifest, split),
            source_type="local" if scheme == "file" else scheme,
            source=json.dumps({"uri": address}),
            schema=json.dumps(_schema(manifest)),
            profile=json.dumps(_profile(manifest, split)),
        )
        for split in manifest.splits
    }


def log_inputs(
    tracker: Tracker, run_id: str, known: dict[str, Dataset], splits: Sequence[str]
) -> None:
    """Logs the datasets of these splits as inputs of a run. Splits that are absent are left out."""
    inputs = [
        DatasetInput(known[split], [InputTag(CONTEXT_TAG, CONTEXTS[split])])
        for split in splits
        if split in known
    ]
    tracker.client.log_inputs(run_id, datasets=inputs)


def inputs_of(run: Run) -> list[dict[str, Any]]:
    """Returns the datasets of a run as `mantis lineage` lists them."""
    return [
        {
            "name": given.dataset.name,
            "digest": given.dataset.digest,
            "context": next((t.value for t in given.tags if t.key == CONTEXT_TAG), ""),
            "rows": json.loads(given.dataset.profile or "{}").get("rows"),
            "source": json.loads(given.dataset.source).get("uri"),
        }
        for given in (run.inputs.dataset_inputs if run.inputs else ())
    ]


def without_secrets(uri: str) -> str:
    """Returns a URI without user, password and query. A local path stays as it is."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _digest(manifest: Manifest, split: str) -> str:
    shards = [shard.sha256 for shard in manifest.splits[split].shards]
    content = {"shards": shards, "tasks": [asdict(task) for task in manifest.tasks]}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def _schema(manifest: Manifest) -> dict[str, Any]:
    """Returns the columns of the shards, as `data_prep.prepare.shards` writes them."""
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec
    from mlflow.types.schema import Array

    masks = [task.name for task in manifest.tasks if task.kind == "segmentation"]
    columns: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.long, "row_id"),
        ColSpec(DataType.string, "source_id"),
        ColSpec(DataType.binary, "image"),
        ColSpec(DataType.integer, "class_label"),
        ColSpec(Array(DataType.integer), "labels"),
        ColSpec(Array(DataType.boolean), "task_mask"),
        *(ColSpec(DataType.binary, f"mask_{name}", required=False) for name in masks),
    ]
    return {"mlflow_colspec": Schema(columns).to_dict()}


def _profile(manifest: Manifest, split: str) -> dict[str, Any]:
    """Returns flat entries, because MLflow's page shows one line for each."""
    height, width = manifest.image_size
    return {
        "rows": manifest.splits[split].rows,
        "bytes": manifest.splits[split].bytes,
        "image_size": f"{height} x {width}",
        "tasks": ", ".join(
            f"{task.name} ({task.num_classes} classes{_MASKS.get(task.kind, '')})"
            for task in manifest.tasks
        ),
        "classes": len(manifest.classes),
        "one_class_per_image": manifest.single_class,
        "rows_of_other_splits": ", ".join(
            f"{info.rows} {name}" for name, info in manifest.splits.items() if name != split
        ),
        "images_of_no_task": manifest.unassigned.get(split, 0),
        "unreadable_images_of_all_splits": manifest.rejected,
        "sources": ", ".join(f"{source.name} ({source.kind})" for source in manifest.sources),
        "fingerprint_of_all_splits": manifest.fingerprint,
    }
