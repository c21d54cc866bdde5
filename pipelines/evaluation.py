"""Measures every arm on the whole evaluation split, each image by its own bitstream, on Ray Data.

`ArmActor` runs in Ray Data actors and gives one row an image and arm; the driver only adds up, and
writes evaluation.json and predictions.parquet into the stage's folder.
"""

from __future__ import annotations

import base64
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.reader import eval_rows, local_batches
from data_prep.schema import DataConfig, DataError, Manifest, read_manifest
from mantis_core.metrics import ImageRecords, detector_confusion, figures
from mantis_core.tasks import TaskSpec
from pipelines.task_specs import tasks_of

if TYPE_CHECKING:
    from pipelines.plan import StageSpec
    from pipelines.settings import Settings
    from pipelines.stages import StageContext

SPLIT = "val"
EXAMPLES = 8
"""Images of each batch whose whole answer is kept, for the report."""
Arrays = dict[str, np.ndarray[Any, Any]]
LABELS = {
    "mantis": "MANTiS",
    "none": "no conditioning",
    "none_prior": "no conditioning, task prior",
    "student": "entropic student",
    "oracle": "oracle tasks",
    "individual": "individual models, uncompressed",
    "teacher": "teacher, uncompressed",
    "jpeg": "JPEG, then the teacher",
    "webp": "WebP, then the teacher",
    "avif": "AVIF, then the teacher",
}


class EvaluationError(RuntimeError):
    """The evaluation lost or doubled rows; its figures are not written."""


@dataclass(frozen=True)
class ArmSource:
    """An arm and its weights: a stage's folder, a model folder, or none (a teacher's file).

    `quality` is that of an image codec."""

    name: str
    kind: str
    folder: str | None
    quality: int | None = None


class ArmActor:
    """The Ray Data actor: an `ArmEvaluator`, whose libraries only the actor imports."""

    def __init__(self, **arguments: Any) -> None:
        from pipelines.arms import ArmEvaluator

        self.evaluator = ArmEvaluator(**arguments)

    def __call__(self, batch: Arrays) -> Arrays:
        return self.evaluator(batch)


@dataclass(frozen=True)
class Evaluated:
    """What one pass over a split gave: by arm name the columns of its answers, in row order."""

    answers: dict[str, Arrays]
    tasks: tuple[TaskSpec, ...]
    single_class: bool
    image_size: tuple[int, int]


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """The `evaluate` stage: every planned arm; returns the main arm's figures."""
    from pipelines.plan import plan_arms

    settings = context.settings
    manifest = read_manifest(context.manifest_folder)
    sources = [
        ArmSource(
            name=arm.name,
            kind=arm.kind,
            folder=context.specs[arm.stage].folder if arm.stage else None,
            quality=arm.quality,
        )
        for arm in plan_arms(settings)
    ]
    done = evaluate_split(
        context.manifest_folder,
        manifest,
        settings.data,
        sources,
        settings=settings,
        batch_size=settings.evaluate.batch_size,
        on_rows=lambda rows, total: context.console.progress(
            spec.name, {"step": rows, "steps": total}
        ),
    )
    arms = []
    for arm in plan_arms(settings):
        record = {
            "name": arm.name,
            "label": LABELS[arm.kind],
            "kind": arm.kind,
            "rate_weight": arm.rate_weight,
            "quality": arm.quality,
            "seed": arm.seed,
            "stage_key": context.specs[arm.stage].key if arm.stage else "",
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
        "examples": examples(context.manifest_folder, manifest, settings.data, done, main["name"]),
    }
    context.store.write_bytes(f"{spec.folder}/predictions.parquet", _parquet(done))
    context.store.write_json(f"{spec.folder}/evaluation.json", evaluation)
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
            batch_size=settings.evaluate.batch_size,
        )
        return {
            "rows": manifest.splits[SPLIT].rows,
            "rejected": manifest.rejected,
            "unassigned": manifest.unassigned.get(SPLIT, 0),
            "metrics": arm_figures(done, "model")["metrics"],
        }


def evaluate_split(
    folder: str,
    manifest: Manifest,
    data: DataConfig,
    sources: Sequence[ArmSource],
    *,
    settings: Settings,
    batch_size: int,
    on_rows: Any = None,
) -> Evaluated:
    """Runs all arms over the split in one pass; checks that no row was lost or seen twice."""
    import ray

    rows = manifest.split(SPLIT).rows
    gpus = settings.cluster.gpus_per_worker
    free = ray.cluster_resources().get("GPU" if gpus else "CPU", 1.0)
    wanted = settings.cluster.evaluation_actors or max(1, int(free if gpus else free - 1))
    actors = max(1, min(wanted, -(-rows // batch_size)))
    dataset = eval_rows(folder, manifest, data, SPLIT).map_batches(
        ArmActor,
        fn_constructor_kwargs={
            "sources": [asdict(source) for source in sources],
            "settings": settings.model_dump(mode="json"),
            "data": data.model_dump(mode="json"),
            "manifest": manifest.model_dump(mode="json"),
            "batch_size": batch_size,
            "threads": max(1, len(os.sched_getaffinity(0)) // actors),
        },
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    parts: list[Arrays] = []
    seen = 0
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        parts.append(batch)
        seen += len(batch["arm"])
        if on_rows is not None:
            on_rows(seen // max(1, len(sources)), rows)
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    answers = {}
    for number, source in enumerate(sources):
        own = np.flatnonzero(found["arm"] == number)
        own = own[np.argsort(found["row_id"][own], kind="stable")]
        ids = found["row_id"][own]
        if len(ids) != rows or len(np.unique(ids)) != rows:
            raise EvaluationError(
                f"{source.name}: {len(ids)} answers ({len(np.unique(ids))} different rows) for the "
                f"{rows} rows of {SPLIT}; run the evaluation again"
            )
        answers[source.name] = {name: values[own] for name, values in found.items()}
    return Evaluated(answers, tasks_of(manifest), manifest.single_class, manifest.image_size)


def arm_figures(done: Evaluated, name: str) -> dict[str, Any]:
    """An arm's `metrics`, and its `detector_confusion` if it detects."""
    records = to_records(done.answers[name], done.tasks)
    height, width = done.image_size
    metrics = figures(records, done.tasks, single_class=done.single_class, pixels=height * width)
    confusion = None
    if records.probabilities is not None:
        confusion = detector_confusion(records.probabilities, records.task_mask)
    return {"metrics": metrics, "detector_confusion": confusion}


def to_records(own: Arrays, tasks: Sequence[TaskSpec]) -> ImageRecords:
    """An arm's columns as records; a column of -1 stands for what the arm has not."""
    sends, detects = own["wire_bytes"][0] >= 0, own["probabilities"][0, 0] >= 0
    confusion = {
        task.name: own[f"confusion/{task.name}"]
        .sum(axis=0)
        .reshape(task.num_classes, task.num_classes + 1)
        for task in tasks
        if not task.is_classification
    }
    return ImageRecords(
        class_label=own["class_label"],
        labels=own["labels"],
        task_mask=own["task_mask"].astype(bool),
        class_index=own["class_index"],
        predicted=own["predicted"],
        decoded=own["decoded"].astype(bool),
        probabilities=own["probabilities"] if detects else None,
        wire_bytes=own["wire_bytes"] if sends else None,
        payload_bytes=own["payload_bytes"] if sends else None,
        estimated_bits=own["estimated_bits"] if sends else None,
        confusion=confusion,
    )


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
