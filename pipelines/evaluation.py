"""The `evaluate` stage and the scoring of one model: what is measured, and what is written of it.

Images are coded and decoded in split_pass.py; evaluation.json and predictions.parquet, in the
stage's folder, hold what came out.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.reader import local_batches
from data_prep.schema import DataConfig, DataError, Manifest, read_manifest
from pipelines.split_pass import (
    EXAMPLES,
    SPLIT,
    ArmSource,
    Evaluated,
    arm_figures,
    evaluate_split,
)

if TYPE_CHECKING:
    from pipelines.plan import StageSpec
    from pipelines.settings import Settings
    from pipelines.stages import StageContext
    from pipelines.storage import Store

LABELS = {
    "mantis": "MANTiS",
    "early_exit": "MANTiS, early exit",
    "none": "no conditioning",
    "none_exit": "no conditioning, early exit",
    "none_prior": "no conditioning, task prior",
    "student": "entropic student",
    "oracle": "oracle tasks",
    "per_task": "individual codecs, the task known",
    "individual": "individual models, uncompressed",
    "teacher": "teacher, uncompressed",
    "jpeg": "JPEG, then the teacher",
    "webp": "WebP, then the teacher",
    "avif": "AVIF, then the teacher",
    "jpeg_tuned": "JPEG, then a teacher tuned on it",
    "webp_tuned": "WebP, then a teacher tuned on it",
    "avif_tuned": "AVIF, then a teacher tuned on it",
}


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """The `evaluate` stage: every planned arm; returns the main arm's figures."""
    settings = context.settings
    done = evaluate_split(
        context.manifest_folder,
        read_manifest(context.manifest_folder),
        settings.data,
        arm_sources(settings, context.specs),
        settings=settings,
        on_rows=lambda rows, total: context.console.progress(
            spec.name, {"step": rows, "steps": total}
        ),
    )
    return write_evaluation(
        spec, settings, context.specs, context.store, context.manifest_folder, done
    )


def arm_sources(settings: Settings, specs: Mapping[str, StageSpec]) -> list[ArmSource]:
    """Every planned arm with the folder of the stage it measures, the main arm first."""
    from pipelines.plan import plan_arms

    return [
        ArmSource(
            name=arm.name,
            kind=arm.kind,
            folder=specs[arm.stage].folder if arm.stage else None,
            quality=arm.quality,
            exit_confidence=arm.exit_confidence,
        )
        for arm in plan_arms(settings)
    ]


def write_evaluation(
    spec: StageSpec,
    settings: Settings,
    specs: Mapping[str, StageSpec],
    store: Store,
    manifest_folder: str,
    done: Evaluated,
) -> dict[str, Any]:
    """Writes evaluation.json and predictions.parquet; returns the stage's result."""
    from pipelines.plan import plan_arms

    manifest = read_manifest(manifest_folder)
    arms = []
    for arm in plan_arms(settings):
        record = {
            "name": arm.name,
            "label": LABELS[arm.kind],
            "kind": arm.kind,
            "rate_weight": arm.rate_weight,
            "quality": arm.quality,
            "exit_confidence": arm.exit_confidence,
            "seed": arm.seed,
            "stage_key": specs[arm.stage].key if arm.stage else "",
        }
        arms.append({**record, **arm_figures(done, arm.name)})
    main = arms[0]
    evaluation = {
        "split": SPLIT,
        "rows": manifest.split(SPLIT).rows,
        "image_size": list(manifest.image_size),
        "tasks": [
            {"name": task.name, "kind": task.kind, "labels": list(task.labels)}
            for task in done.tasks
        ],
        "single_class": manifest.single_class,
        "arms": arms,
        "examples": examples(manifest_folder, manifest, settings.data, done, main["name"]),
    }
    store.write_bytes(f"{spec.folder}/predictions.parquet", _parquet(done))
    store.write_json(f"{spec.folder}/evaluation.json", evaluation)
    metrics = main["metrics"]
    shown = [
        f"{name.removeprefix('val/')} {metrics[name]:.4g}"
        for name in ("val/top1", "val/wire_bytes", "val/bpp")
        if name in metrics
    ]
    return {"metrics": metrics, "arms": len(arms), "summary": ", ".join(shown)}


def evaluate_model(model_folder: Path, data_path: str, settings: Settings) -> dict[str, Any]:
    """Scores one registered model or checkpoint on images it never saw, prepared as its own were.

    `data_path` is a Parquet file or a folder of images by class. Returns {"rows", "rejected",
    "unassigned", "metrics"}. Raises DataError where the data has none of the model's classes.
    """
    from data_prep.schema import Task, TaskTable
    from data_prep.shards import prepare
    from data_prep.sources import source_for_path
    from mantis_core.checkpoint import load_model, read_meta

    preparation = read_meta(model_folder)["preparation"]
    model = load_model(model_folder)
    table = TaskTable(
        tasks=tuple(
            Task(t.name, t.kind, t.labels, t.classes, t.num_classes) for t in model.spec.tasks
        ),
        classes=model.spec.classes,
        class_names=model.spec.class_names,
        masks=tuple(preparation["masks"]),
        ignored=tuple(tuple(values) for values in preparation["ignored"]),
    )
    source = source_for_path(data_path, DataConfig.model_validate(preparation["data"]))
    whole = {"sources": [source.model_dump()], "val_rows": None}
    data = DataConfig.model_validate({**preparation["data"], **whole})
    with tempfile.TemporaryDirectory(prefix="mantis-score-") as folder:
        manifest = prepare(
            data, table, seed=preparation["seed"], output=folder, splits=(SPLIT,), progress=None
        )
        if not manifest.splits[SPLIT].rows:
            raise DataError(
                f"{data_path} has no image of this model's classes "
                f"({', '.join(model.spec.classes[:3])}, ...): give images of the same classes"
            )
        sources = [ArmSource("model", "mantis", str(model_folder))]
        done = evaluate_split(
            folder,
            manifest,
            data,
            sources,
            settings=settings,
        )
        return {
            "rows": manifest.splits[SPLIT].rows,
            "rejected": manifest.rejected,
            "unassigned": manifest.unassigned.get(SPLIT, 0),
            "metrics": arm_figures(done, "model")["metrics"],
        }


def examples(
    folder: str, manifest: Manifest, data: DataConfig, done: Evaluated, arm: str
) -> list[dict[str, Any]]:
    """The first images of the split with their truth and what the arm answered, for the report."""
    rows = next(local_batches(folder, manifest, data, split=SPLIT, global_batch=EXAMPLES))
    own = done.answers[arm]
    place = {row_id: index for index, row_id in enumerate(own["row_id"].tolist())}
    shown = []
    for index, row_id in enumerate(rows["row_id"].tolist()):
        answer = json.loads(own["answer"][place[row_id]])
        truth = {
            task.name: task.labels[int(rows["labels"][index, k])] if task.labels else ""
            for k, task in enumerate(done.tasks)
            if task.is_classification and rows["task_mask"][index, k]
        }
        truth |= {
            task.name: "mask"
            for k, task in enumerate(done.tasks)
            if not task.is_classification and rows["task_mask"][index, k]
        }
        decoded = {**answer["label_names"], **{name: "mask" for name in answer["segmentation"]}}
        shown.append(
            {
                "arm": arm,
                "jpeg_base64": _jpeg(rows["image"][index]),
                "wire_bytes": int(own["wire_bytes"][place[row_id]]),
                "true": truth,
                "answer": decoded,
                "class": answer["class_name"],
            }
        )
    return shown


def _jpeg(image: np.ndarray[Any, Any]) -> str:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=90)
    return base64.b64encode(stream.getvalue()).decode()


def _parquet(done: Evaluated) -> bytes:
    """All arms' answers as one Parquet file, a row an arm and image."""
    parts = []
    for name, own in done.answers.items():
        columns = {
            key: pa.array(list(values) if values.ndim > 1 else values)
            for key, values in own.items()
            if key not in ("arm", "answer")
        }
        parts.append(pa.table({"arm": pa.array([name] * len(own["row_id"])), **columns}))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(parts), sink, compression="zstd")
    return sink.getvalue()
