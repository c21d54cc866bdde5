"""Measures a registered model or a checkpoint folder on other images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import DataConfig
from data_prep.errors import DataError
from mantis_core.rates import levels_of
from pipelines.evaluation.arms import SPLIT, ArmSource
from pipelines.evaluation.split_pass import arm_figures, chance_of, evaluate_split
from pipelines.storage import Store, is_shared, shared_scratch
from pipelines.training.files import COMPUTED_ON

if TYPE_CHECKING:
    from pipelines.settings.sections import Settings


def evaluate_model(
    model_folder: Path, data_path: str, settings: Settings, root: str, *, labels: str | None = None
) -> dict[str, Any]:
    """Measures a model on other images, prepared in the same way as its training images.

    `data_path` is a Parquet or tar file, or a folder with one folder of images for each class, or a
    flat one with the label file `labels`. The prepared images lie below the storage root `root` for
    the time of the measurement. If that is a URI, a copy of the model lies beside them, because
    other nodes measure too. Returns {"rows", "rejected", "unassigned", "remarks", "metrics",
    "levels", "chance", "computed_on"}. `levels` holds the metrics at each rate of a model of
    several, and `metrics` those of the first. Raises DataError if the data has none of the model's
    classes.
    """
    from data_prep.finding import source_for_path
    from data_prep.manifest import Task, TaskTable
    from data_prep.prepare.shards import prepare
    from mantis_core.codec.checkpoint import load_model
    from mantis_core.folders import read_meta

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
    like = DataConfig.model_validate(preparation["data"])
    source = source_for_path(data_path, like, labels=labels)
    whole = {"sources": [source.model_dump()], "val_rows": None}
    data = DataConfig.model_validate({**preparation["data"], **whole})
    with shared_scratch(root, "mantis-score") as folder:
        manifest = prepare(
            data, table, seed=preparation["seed"], output=folder, splits=(SPLIT,), progress=None
        )
        if not manifest.splits[SPLIT].rows:
            raise DataError(
                f"{data_path} has no image of this model's classes "
                f"({', '.join(model.spec.classes[:3])}, ...): give images of the same classes"
            )
        weights = str(model_folder)
        if is_shared(root):
            weights = f"{folder}/model"
            Store(weights).upload_folder(model_folder, "")
        sources = [
            ArmSource(f"level {level}", "mantis", weights, level=level)
            for level in levels_of(model.spec.rates) or (None,)
        ]
        done = evaluate_split(
            folder,
            manifest,
            data.reading,
            sources,
            settings=settings,
        )
        if model.spec.model.requests == "asked":  # about tasks, not about which class it is
            done = replace(done, single_class=False)
        levels = [
            {
                "level": source.level,
                "rate_weight": rate,
                "metrics": arm_figures(done, source.name)["metrics"],
            }
            for source, rate in zip(sources, model.spec.rates or (None,), strict=True)
        ]
        return {
            "rows": manifest.splits[SPLIT].rows,
            "rejected": manifest.rejected,
            "unassigned": manifest.unassigned.get(SPLIT, 0),
            "remarks": list(manifest.remarks),
            "metrics": levels[0]["metrics"],
            "levels": levels if model.spec.rates else [],
            "chance": chance_of(done),
            COMPUTED_ON: list(done.computed_on),
        }
