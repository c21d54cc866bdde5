"""What an arm answers for a batch of images: real streams for codecs, plain networks otherwise.

Runs inside Ray Data actors, one row out for each image and arm. Adds nothing up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.schema import DataConfig, Manifest
from mantis_core.build import Problem, new_teacher
from mantis_core.checkpoint import load_model
from mantis_core.image_codecs import IMAGE_CODECS
from mantis_core.metrics import pixel_confusion
from mantis_core.model import Mantis
from mantis_core.per_task import PerTaskCodecs, load_codecs
from mantis_core.preprocessing import normalise
from mantis_core.tasks import TaskSpec
from mantis_core.teacher import Teacher
from mantis_core.uncompressed_recipes import individual_models
from pipelines.plan import TUNED
from pipelines.problem import problem_of
from pipelines.settings import Settings
from pipelines.split_pass import EXAMPLES, ArmSource, Arrays
from pipelines.trainer import CHECKPOINT
from pipelines.worker import load_teacher, local_copy, stage_tensors


class ArmEvaluator:
    """A Ray Data actor that holds every arm's model and takes each batch through all of them."""

    def __init__(
        self,
        *,
        sources: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        data: Mapping[str, Any],
        manifest: Mapping[str, Any],
        batch_size: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        problem = problem_of(Manifest.model_validate(manifest), DataConfig.model_validate(data))
        self.problem, self.batch_size = problem, batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        resolved = Settings.model_validate(dict(settings))
        self.arms: list[tuple[ArmSource, nn.Module]] = []
        loaded: dict[str, nn.Module] = {}
        for entry in sources:
            source = ArmSource(**entry)
            key = f"{LOADED_AS[source.kind]}:{source.folder}"
            if key not in loaded:
                loaded[key] = _load(source, resolved, problem).to(self.device).eval()
            self.arms.append((source, loaded[key]))

    def __call__(self, batch: Arrays) -> Arrays:
        """A batch of the reader to rows of all arms, arm after arm."""
        images = torch.from_numpy(np.ascontiguousarray(batch["image"]))
        count = len(images)
        if count < self.batch_size:  # one shape always: an answer never depends on companions
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        images = images.to(self.device)
        parts = []
        for number, (source, model) in enumerate(self.arms):
            with torch.no_grad():
                if source.quality is not None:
                    rows = run_image_codec(model, images, batch, self.problem, source)
                elif source.exit_confidence is not None:
                    sure = source.exit_confidence
                    rows = run_codec(model, images, batch, self.problem, exit_confidence=sure)
                else:
                    rows = RUNNERS[source.kind](model, images, batch, self.problem)
            rows = {name: values[:count] for name, values in rows.items()}
            rows["arm"] = np.full(count, number)
            parts.append(rows)
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name in ("row_id", "class_label", "labels", "task_mask"):
            out[name] = np.concatenate([batch[name]] * len(parts))
        return out


def run_codec(
    model: Mantis,
    images: Tensor,
    batch: Arrays,
    problem: Problem,
    *,
    oracle: bool = False,
    exit_confidence: float | None = None,
) -> Arrays:
    """Client, wire and server: every image encoded to bytes and decoded from those bytes alone."""
    count, tasks = len(images), problem.tasks
    asked = None
    if oracle:
        asked = torch.zeros(count, len(tasks), dtype=torch.bool)
        asked[: len(batch["task_mask"])] = torch.from_numpy(np.array(batch["task_mask"]))
        asked[~asked.any(dim=1), 0] = True  # an image of no task still has to ask for one
    encoded = model.encode_in_detail(images, asked, exit_confidence=exit_confidence)
    answers = model.decode([each.data for each in encoded])
    rows = _blank(count, tasks)
    for index, (sent, answer) in enumerate(zip(encoded, answers, strict=True)):
        rows["wire_bytes"][index] = len(sent.data)
        rows["payload_bytes"][index] = sent.payload_bytes
        rows["estimated_bits"][index] = sent.estimated_bits
        rows["decoded"][index] = sent.mask
        rows["answered"][index] = sent.answered
        rows["class_index"][index] = answer.class_index
        if index < EXAMPLES:
            rows["answer"][index] = json.dumps(answer.to_dict())
        if not oracle:
            rows["probabilities"][index] = sent.probabilities
        for k, task in enumerate(tasks):
            rows["predicted"][index, k] = answer.labels.get(task.name, -1)
        if index < len(batch["task_mask"]):
            _count_pixels(rows, index, batch, tasks, answer.segmentation)
    return rows


def run_student(model: Mantis, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """A codec of one task of all classes: its class is the answer to the image's true tasks."""
    encoded = model.encode_in_detail(images)
    answers = model.decode([each.data for each in encoded])
    rows = _blank(len(images), problem.tasks)
    rows["decoded"][: len(batch["task_mask"])] = batch["task_mask"]
    for index, (sent, answer) in enumerate(zip(encoded, answers, strict=True)):
        rows["wire_bytes"][index] = len(sent.data)
        rows["payload_bytes"][index] = sent.payload_bytes
        rows["estimated_bits"][index] = sent.estimated_bits
        rows["class_index"][index] = answer.class_index
        for k, task in enumerate(problem.tasks):
            if answer.class_index in task.classes:
                rows["predicted"][index, k] = task.classes.index(answer.class_index)
    return rows


def run_per_task(codecs: PerTaskCodecs, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """Every image by the codec of each task it carries; what all of them send is counted."""
    rows = _blank(len(images), problem.tasks)
    for name in ("wire_bytes", "payload_bytes", "estimated_bits"):
        rows[name][:] = 0
    carried = batch["task_mask"]
    rows["decoded"][: len(carried)] = carried
    for k, task in enumerate(problem.tasks):
        codec, own = codecs[task.name], np.flatnonzero(carried[:, k])
        if not len(own):
            continue
        encoded = codec.encode_in_detail(images[torch.from_numpy(own)])
        answers = codec.decode([each.data for each in encoded])
        for index, sent, answer in zip(own, encoded, answers, strict=True):
            rows["wire_bytes"][index] += len(sent.data)
            rows["payload_bytes"][index] += sent.payload_bytes
            rows["estimated_bits"][index] += sent.estimated_bits
            if task.is_classification:
                rows["predicted"][index, k] = answer.labels[task.name]
                if problem.single_class:
                    rows["class_index"][index] = task.classes[answer.labels[task.name]]
            _count_pixels(rows, index, batch, (task,), answer.segmentation)
    return rows


def run_teacher(model: Teacher, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """The uncompressed teacher: flat logits, or each head on its own tasks."""
    outputs = model(normalise(images))
    rows = _blank(len(images), problem.tasks)
    if "logits" in outputs:
        logits = outputs["logits"]
        rows["class_index"] = logits.argmax(dim=1).cpu().numpy()
        rows["probabilities"] = _group_posteriors(logits, problem.tasks)
        outputs = {
            f"logits/{task.name}": logits[:, list(task.classes)]
            for task in problem.tasks
            if task.is_classification
        }
    return _with_heads(rows, outputs, batch, problem.tasks)


def run_image_codec(
    model: Teacher, images: Tensor, batch: Arrays, problem: Problem, source: ArmSource
) -> Arrays:
    """Every image to a file and back, then the teacher; the file is what is sent."""
    codec = IMAGE_CODECS[source.kind.removesuffix(TUNED)]
    assert source.quality is not None
    files = [
        codec.encode(image, source.quality) for image in images.permute(0, 2, 3, 1).cpu().numpy()
    ]
    decoded = torch.from_numpy(np.stack([codec.decode(data) for data in files]))
    rows = run_teacher(model, decoded.permute(0, 3, 1, 2).to(images.device), batch, problem)
    rows["probabilities"][:] = -1.0  # nothing is detected
    rows["wire_bytes"][:] = [len(data) for data in files]
    rows["payload_bytes"][:] = [codec.coded_bytes(data) for data in files]
    return rows


def run_individual(model: nn.ModuleDict, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """One uncompressed network a task, each asked about its own images (the task is known)."""
    pixels = normalise(images)
    outputs = {
        f"logits/{task.name}": model[task.name](pixels)[f"logits/{task.name}"]
        for task in problem.tasks
    }
    return _with_heads(_blank(len(images), problem.tasks), outputs, batch, problem.tasks)


def _group_posteriors(logits: Tensor, tasks: Sequence[TaskSpec]) -> np.ndarray[Any, Any]:
    """P of each task (B, K): the sum of the flat softmax over its classes."""
    soft = torch.softmax(logits.float(), dim=1)
    groups = [soft[:, list(task.classes)].sum(dim=1) for task in tasks]
    return torch.stack(groups, dim=1).cpu().numpy()


def _run_oracle(model: Mantis, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    return run_codec(model, images, batch, problem, oracle=True)


def _with_heads(
    rows: Arrays, outputs: Mapping[str, Tensor], batch: Arrays, tasks: Sequence[TaskSpec]
) -> Arrays:
    count = len(batch["task_mask"])
    rows["decoded"][:count] = batch["task_mask"]
    for k, task in enumerate(tasks):
        output = outputs.get(f"logits/{task.name}")
        if output is None:
            rows["decoded"][:, k] = False
        elif task.is_classification:
            rows["predicted"][:, k] = output.argmax(dim=1).cpu().numpy()
        else:
            masks = output.argmax(dim=1).to(torch.uint8).cpu().numpy()
            for index in range(count):
                _count_pixels(rows, index, batch, [task], {task.name: masks[index]})
    return rows


def _blank(count: int, tasks: Sequence[TaskSpec]) -> Arrays:
    """Rows that say nothing: -1 where an arm has no such answer."""
    rows: Arrays = {
        "wire_bytes": np.full(count, -1),
        "payload_bytes": np.full(count, -1.0),
        "estimated_bits": np.full(count, -1.0),
        "decoded": np.zeros((count, len(tasks)), dtype=bool),
        "answered": np.zeros(count, dtype=bool),
        "predicted": np.full((count, len(tasks)), -1),
        "probabilities": np.full((count, len(tasks)), -1.0, dtype=np.float32),
        "class_index": np.full(count, -1),
        "answer": np.full(count, "", dtype=object),
    }
    for task in tasks:
        if not task.is_classification:
            cells = task.num_classes * (task.num_classes + 1)
            rows[f"confusion/{task.name}"] = np.zeros((count, cells), dtype=np.int64)
    return rows


def _count_pixels(
    rows: Arrays,
    index: int,
    batch: Arrays,
    tasks: Sequence[TaskSpec],
    answers: Mapping[str, np.ndarray[Any, Any]],
) -> None:
    for task in tasks:
        key = f"segmentation/{task.name}"
        if not task.is_classification and key in batch:
            counts = pixel_confusion(batch[key][index], answers.get(task.name), task.num_classes)
            rows[f"confusion/{task.name}"][index] = counts.reshape(-1)


def _load(source: ArmSource, settings: Settings, problem: Problem) -> nn.Module:
    if source.kind.endswith(TUNED):
        assert source.folder is not None
        teacher = new_teacher(settings.teacher, problem)
        teacher.load_state_dict(stage_tensors(source.folder))
        return teacher
    if LOADED_AS[source.kind] == "teacher":
        return load_teacher(settings, problem, source.folder)
    assert source.folder is not None
    if source.kind == "individual":
        tensors = stage_tensors(source.folder)
        untrained = new_teacher(settings.teacher, problem)
        models = individual_models(untrained, problem.image_size)
        models.load_state_dict(tensors)
        return models
    with local_copy(source.folder) as folder:
        inner = folder / CHECKPOINT
        if source.kind == "per_task":
            return load_codecs(inner)
        return load_model(inner if inner.is_dir() else folder)


RUNNERS: dict[str, Any] = {
    "mantis": run_codec,
    "none": run_codec,
    "none_prior": run_codec,
    "student": run_student,
    "per_task": run_per_task,
    "oracle": _run_oracle,
    "teacher": run_teacher,
    "individual": run_individual,
}
# Arms that share weights share one loaded model.
LOADED_AS = {
    kind: "codec"
    for kind in ("mantis", "early_exit", "none", "none_exit", "none_prior", "student", "oracle")
} | {
    "per_task": "per_task",
    "individual": "individual",
    **dict.fromkeys(("teacher", *IMAGE_CODECS, *(f"{c}{TUNED}" for c in IMAGE_CODECS)), "teacher"),
}
