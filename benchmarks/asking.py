"""Measures what a request for one task saves: bytes and accuracy of a trained codec per task.

    python -m benchmarks.asking MODEL SHARDS [--images N]

MODEL is a checkpoint folder, SHARDS the folder that `mantis prepare` wrote for it. The validation
images of each task are encoded three times: for that task alone, for every task, and for the
detected tasks. The real streams are decoded again. The figure of a task is its accuracy, or the
mean intersection over union of a segmentation. The last line is one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.program import one_message
from data_prep.config import DataConfig
from data_prep.manifest import read_manifest
from data_prep.read.batches import local_batches
from mantis_core.codec.checkpoint import load_model
from mantis_core.codec.mantis import Mantis
from mantis_core.folders import read_meta
from mantis_core.measure.metrics import mean_iou, pixel_confusion
from mantis_core.tasks import Batch


def score(
    model: Mantis, batches: Sequence[Batch], task: str, request: Sequence[str] | None
) -> dict[str, float | None]:
    """Returns mean sizes in bytes and a task's figure over the images that have the task.

    A task that is missing from an answer counts as wrong. `request` holds task names; None lets the
    client detect the tasks, as in `Mantis.encode`.
    """
    k = model.spec.task_names.index(task)
    spec = model.spec.tasks[k]
    wire, payload, hits = [], [], []
    confusion = np.zeros((spec.num_classes, spec.num_classes + 1), dtype=np.int64)
    for batch in batches:
        mine = batch.task_mask[:, k].nonzero()[:, 0]
        if not len(mine):
            continue
        sent = model.encode_in_detail(batch.image[mine], request)
        answers = model.decode([each.data for each in sent])
        wire += [len(each.data) for each in sent]
        payload += [each.payload_bytes for each in sent]
        for row, answer in zip(mine.tolist(), answers, strict=True):
            if spec.is_classification:
                hits.append(answer.labels.get(task) == int(batch.labels[row, k]))
            else:
                truth = batch.segmentation[task][row].numpy()
                found = answer.segmentation.get(task)
                confusion += pixel_confusion(truth, found, spec.num_classes)
    figure = float(np.mean(hits)) if spec.is_classification else mean_iou(confusion)
    return {
        "wire_bytes": round(float(np.mean(wire)), 2),
        "payload_bytes": round(float(np.mean(payload)), 2),
        "figure": None if figure is None else round(figure, 4),
    }


def table(model: Mantis, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Returns one row for each task that at least one image has."""
    rows = []
    for k, task in enumerate(model.spec.task_names):
        images = sum(int(batch.task_mask[:, k].sum()) for batch in batches)
        if not images:
            continue
        alone = score(model, batches, task, [task])
        every = score(model, batches, task, model.spec.task_names)
        rows.append(
            {
                "task": task,
                "images": images,
                "alone": alone,
                "all": every,
                "detected": score(model, batches, task, None),
            }
        )
    return rows


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Formats wire bytes and figure of each task and request; payload bytes are only in JSON."""
    kinds = ("alone", "all", "detected")
    shown = Table(title="requested: one task alone, all tasks, or the detected tasks")
    shown.add_column("task", overflow="fold")
    shown.add_column("images", justify="right")
    for kind in kinds:
        shown.add_column(f"{kind}\nwire B", justify="right", no_wrap=True)
        shown.add_column("\nfigure", justify="right", no_wrap=True)
    for row in rows:
        cells: list[str] = []
        for kind in kinds:
            found = row[kind]
            figure = found["figure"]
            cells += [f"{found['wire_bytes']:.1f}", "" if figure is None else f"{figure:.3f}"]
        shown.add_row(row["task"], str(row["images"]), *cells)
    return shown


@one_message
def main() -> int:
    """Encodes and decodes the images for each task and request, and prints all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("shards", help="folder that `mantis prepare` wrote for the model")
    parser.add_argument(
        "--images", type=int, metavar="N", help="only the first N validation images; default: all"
    )
    arguments = parser.parse_args()
    if arguments.images is not None and arguments.images < 1:
        parser.error(f"--images is {arguments.images}: give 1 or more, or leave it out for all")
    model = load_model(arguments.model)
    data = DataConfig.model_validate(read_meta(arguments.model)["preparation"]["data"])
    manifest = read_manifest(arguments.shards)
    batches, left = [], arguments.images or manifest.split("val").rows
    for arrays in local_batches(
        arguments.shards, manifest, data.reading, split="val", global_batch=min(left, 64), threads=1
    ):
        batches.append(Batch.from_arrays({k: v[:left] for k, v in arrays.items()}))
        left -= len(batches[-1])
        if left <= 0:
            break
    rows = table(model, batches)
    Console(stderr=True).print(as_table(rows))
    print(json.dumps({"images": sum(len(batch) for batch in batches), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
