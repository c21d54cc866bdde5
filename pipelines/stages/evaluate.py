"""Stage `evaluate`: measures every arm and writes answers, figures and the report.

`pipelines/evaluation` encodes and decodes the images. The results are evaluation.json and
predictions.parquet in the stage's folder.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluation.arms import EXAMPLES, SPLIT, Arm, ArmSource
from pipelines.settings.arms import ARM_KINDS
from pipelines.stages.measured import keep_measured, measured_file, read_measured
from pipelines.stages.spec import Inputs, Stage, StageContext, StageSpec
from pipelines.training.files import COMPUTED_ON

if TYPE_CHECKING:
    from data_prep.manifest import Manifest
    from data_prep.reading import ReadingConfig
    from pipelines.evaluation.split_pass import Evaluated
    from pipelines.settings.sections import Settings
    from pipelines.storage import Store


def identities(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """Returns the arms that are measured.

    A scale or a level of None is left out: arms had none when the first evaluations were kept.
    """
    arms = [asdict(arm) for arm in inputs.arms]
    later = (("scale", None), ("level", None))
    return {"arms": [{k: v for k, v in arm.items() if (k, v) not in later} for arm in arms]}


def run(spec: StageSpec, context: StageContext) -> dict[str, Any]:
    """Measures every planned arm that has no kept answers. Returns the figures of the main arm."""
    from data_prep.manifest import read_manifest
    from pipelines.evaluation.split_pass import evaluate_split

    manifest, store = read_manifest(context.manifest_folder), context.store
    found = kept_answers(spec, context.specs, store, manifest)
    missing = [arm for arm in spec.arms if arm.name not in found]
    if found:
        context.console.note(f"{spec.name}: {len(found)} of {len(spec.arms)} arms are known")
    if missing:
        done = evaluate_split(
            context.manifest_folder,
            manifest,
            spec.settings.data.reading,
            arm_sources(missing, context.specs),
            settings=spec.settings,
            on_rows=lambda rows, total: context.console.progress(
                spec.name, {"step": rows, "steps": total}
            ),
        )
        for arm in missing:
            keep_measured(store, measured_file(spec, arm, context.specs), done, arm.name)
            found[arm.name] = done
    together = joined_answers(spec.arms, found)
    return write_evaluation(spec, context.specs, store, context.manifest_folder, together)


def kept_answers(
    spec: StageSpec, specs: Mapping[str, StageSpec], store: Store, manifest: Manifest
) -> dict[str, Evaluated]:
    """Returns the arms, by name, whose answers an earlier evaluation has kept."""
    from pipelines.evaluation.split_pass import Evaluated, decides_a_class
    from pipelines.training.problem import tasks_of

    single_class = decides_a_class(manifest, spec.settings)
    around = Evaluated({}, tasks_of(manifest), single_class, manifest.image_size)
    found = {
        arm.name: read_measured(store, measured_file(spec, arm, specs), arm.name, around)
        for arm in spec.arms
    }
    return {name: kept for name, kept in found.items() if kept is not None}


def joined_answers(arms: Sequence[Arm], found: Mapping[str, Evaluated]) -> Evaluated:
    """Returns the answers of all arms, in order, as those of one pass."""
    from pipelines.evaluation.split_pass import hardware_of

    parts = [found[arm.name] for arm in arms]
    answers = {arm.name: found[arm.name].answers[arm.name] for arm in arms}
    return replace(parts[0], answers=answers, computed_on=hardware_of(parts))


def arm_sources(arms: Sequence[Arm], specs: Mapping[str, StageSpec]) -> list[ArmSource]:
    """Returns each arm with the folder of the stage it measures."""
    return [
        ArmSource(
            name=arm.name,
            kind=arm.kind,
            folder=specs[arm.stage].folder if arm.stage else None,
            quality=arm.quality,
            exit_confidence=arm.exit_confidence,
            scale=arm.scale,
            level=arm.level,
        )
        for arm in arms
    ]


def write_evaluation(
    spec: StageSpec,
    specs: Mapping[str, StageSpec],
    store: Store,
    prepared: str,
    done: Evaluated,
) -> dict[str, Any]:
    """Writes evaluation.json, predictions.parquet and the report. Returns the stage's result."""
    from data_prep.manifest import read_manifest
    from pipelines.evaluation.split_pass import arm_figures, chance_of

    manifest, requests = read_manifest(prepared), spec.settings.model.requests
    arms = []
    for arm in spec.arms:
        record = {
            "name": arm.name,
            "label": ARM_KINDS[arm.kind].label_for(requests),
            "kind": arm.kind,
            "rate_weight": arm.rate_weight,
            "quality": arm.quality,
            "scale": arm.scale,
            "exit_confidence": arm.exit_confidence,
            "level": arm.level,
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
        "single_class": done.single_class,
        "chance": chance_of(done),
        "arms": arms,
        COMPUTED_ON: list(done.computed_on),
        "examples": examples(prepared, manifest, spec.settings.data.reading, done, main["name"]),
    }
    store.write_bytes(f"{spec.folder}/predictions.parquet", _parquet(done))
    store.write_json(f"{spec.folder}/evaluation.json", evaluation)
    add_report(spec.folder, store)
    metrics = main["metrics"]
    shown = [
        f"{name.removeprefix('val/')} {metrics[name]:.4g}"
        for name in ("val/top1", "val/miou", "val/wire_bytes", "val/bpp")
        if name in metrics
    ]
    return {
        "metrics": metrics,
        "arms": len(arms),
        COMPUTED_ON: list(done.computed_on),
        "summary": ", ".join(shown),
    }


def add_report(folder: str, store: Store) -> None:
    """Writes the report beside evaluation.json."""
    from pipelines.report.report import write_report
    from pipelines.storage import scratch

    with scratch(store.root, "mantis-report") as made:
        write_report(store.read_json(f"{folder}/evaluation.json"), made)
        store.upload_folder(made, f"{folder}/report")


def examples(
    folder: str, manifest: Manifest, reading: ReadingConfig, done: Evaluated, arm: str
) -> list[dict[str, Any]]:
    """Returns the first images of the split with their labels and the arm's answers."""
    from data_prep.read.batches import local_batches

    rows = next(local_batches(folder, manifest, reading, split=SPLIT, global_batch=EXAMPLES))
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
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=90)
    return base64.b64encode(stream.getvalue()).decode()


def _parquet(done: Evaluated) -> bytes:
    """Returns the answers of all arms as one Parquet file, with one row for each arm and image."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for name, own in done.answers.items():
        columns = {
            key: pa.array(list(values) if values.ndim > 1 else values)
            for key, values in own.items()
            if key not in ("arm", "answer") and not key.startswith("confusion/")
        }
        parts.append(pa.table({"arm": pa.array([name] * len(own["row_id"])), **columns}))
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(parts), sink, compression="zstd")
    return sink.getvalue()


EVALUATE = Stage(
    name="evaluate",
    help="Measure all arms of an experiment and write the report.",
    after=("prepare", "teacher", "stage2/*", "local/*", "individual/*", "codec_teacher/*"),
    reads=("evaluate.batch_size",),
    identities=identities,
    code=(
        "pipelines.stages.evaluate",
        "pipelines.evaluation.answers",
        "pipelines.evaluation.split_pass",
    ),
    run=run,
)
