"""Measures a registered model or a checkpoint folder on other images."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.storage import write_bytes
from mantis_core.measure.metrics import figures_without_labels
from mantis_core.rates import levels_of
from pipelines.evaluation.arms import SPLIT, ArmSource
from pipelines.evaluation.split_pass import TEACHER, arm_figures, chance_of, evaluate_split
from pipelines.storage import Store, is_shared, shared_scratch
from pipelines.training.files import COMPUTED_ON
from pipelines.training.problem import problem_of_table

if TYPE_CHECKING:
    from mantis_core.tasks import Problem
    from pipelines.settings.sections import Settings


def evaluate_model(
    model_folder: Path,
    data_path: str,
    settings: Settings,
    root: str,
    *,
    labels: str | None = None,
    with_teacher: bool = False,
) -> dict[str, Any]:
    """Measures a model on other images, prepared in the same way as its training images.

    `data_path` is a Parquet or tar file, or a folder with one folder of images for each class, or a
    flat one with the label file `labels`. The prepared images lie below the storage root `root` for
    the time of the measurement. If that is a URI, a copy of the model lies beside them, because
    other nodes measure too. `with_teacher` measures the teacher of `settings` beside the model. It
    then also names the images of a flat folder without labels, of which all figures that need
    labels are left out.

    Returns {"rows", "rejected", "unassigned", "remarks", "metrics", "levels", "teacher", "chance",
    "computed_on"}. `levels` holds the metrics at each rate of a model of several, and `metrics`
    those of the first; `teacher` holds those of the teacher. Raises DataError if the data has none
    of the model's classes.
    """
    from data_prep.finding import source_for_path, undivided_images
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
    unlabelled = undivided_images(data_path) if with_teacher and labels is None else None
    with shared_scratch(root, "mantis-score") as folder:
        if unlabelled is not None:
            problem = problem_of_table(table, like, model.spec.single_class)
            labels = f"{folder}/labels.csv"
            write_bytes(labels, _labels_by_teacher(unlabelled, settings, problem))
        source = source_for_path(data_path, like, labels=labels)
        whole = {"sources": [source.model_dump()], "val_rows": None}
        data = DataConfig.model_validate({**preparation["data"], **whole})
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
        own_arms = [
            ArmSource(f"level {level}", "mantis", weights, level=level)
            for level in levels_of(model.spec.rates) or (None,)
        ]
        teacher_arm = [ArmSource(TEACHER, "teacher", None)] if with_teacher else []
        done = evaluate_split(
            folder,
            manifest,
            data.reading,
            [*own_arms, *teacher_arm],
            settings=settings,
        )
        if model.spec.model.requests == "asked":  # about tasks, not about which class it is
            done = replace(done, single_class=False)
        of_arms = {name: arm_figures(done, name)["metrics"] for name in done.answers}
        remarks = list(manifest.remarks)
        if unlabelled is not None:
            of_arms = {name: figures_without_labels(own) for name, own in of_arms.items()}
            remarks.append(
                f"the images have no labels: {model.spec.teacher} named them, and val/agreement "
                "is how often the model gives the same answer; how often it is right is not known"
            )
        levels = [
            {"level": source.level, "rate_weight": rate, "metrics": of_arms[source.name]}
            for source, rate in zip(own_arms, model.spec.rates or (None,), strict=True)
        ]
        return {
            "rows": manifest.splits[SPLIT].rows,
            "rejected": manifest.rejected,
            "unassigned": manifest.unassigned.get(SPLIT, 0),
            "remarks": remarks,
            "metrics": levels[0]["metrics"],
            "levels": levels if model.spec.rates else [],
            "teacher": of_arms.get(TEACHER),
            "chance": chance_of(done) if unlabelled is None else None,
            COMPUTED_ON: list(done.computed_on),
        }


def _labels_by_teacher(images: str, settings: Settings, problem: Problem) -> bytes:
    """Returns a label file of the images of a folder, each with the class that the teacher names.

    An image that cannot be read has a line as well, because a folder needs one for each; to prepare
    it fails in the same way, and counts it as rejected.
    """
    import torch

    from pipelines.coding.labels import Classifier, LabelFile, Named, find_images, name_each
    from pipelines.training.weights import load_teacher

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(settings, problem, None).to(device)
    classifier = Classifier(
        lambda x: teacher(x)["logits"],
        problem.classes,
        problem.image_size,
        problem.short_side,
        device,
    )
    text, found = io.StringIO(newline=""), find_images(images).files
    file, named = LabelFile(text), set()
    for result in name_each(classifier, images, found, batch_size=settings.evaluate.batch_size):
        if isinstance(result, Named):
            file.add(result)
            named.add(result.file)
    for each in found:
        if each.path not in named:
            file.add(Named(each.path, problem.classes[0], 0.0))
    return text.getvalue().encode()
