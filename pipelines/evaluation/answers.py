"""Runs all arms on a batch of images: codecs through real streams, others as plain networks.

Runs inside Ray Data actors. Returns one row for each image and arm. Sums nothing but pixel counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from data_prep.manifest import Manifest
from mantis_core.baselines.image_codecs import IMAGE_CODECS, coded_at
from mantis_core.baselines.local import (
    LocalClassifier,
    Sizes,
    label_sizes,
    local_classifier,
    mask_sizes,
)
from mantis_core.baselines.per_task import PerTaskCodecs, load_codecs
from mantis_core.baselines.uncompressed import individual_models
from mantis_core.codec.checkpoint import load_model
from mantis_core.codec.mantis import Mantis
from mantis_core.networks.blocks import TaskModules
from mantis_core.networks.inference import full_float32
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Problem, TaskSpec
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.teacher import new_teacher
from pipelines.evaluation.arms import ArmSource, Arrays
from pipelines.evaluation.coded import CODED, Coded, adds, code, run_added, ways_of
from pipelines.evaluation.rows import (
    SIZES,
    blank,
    count_pixels,
    with_labels_of_class,
    with_pixels_summed,
    with_request_sizes,
)
from pipelines.settings.arms import ARM_KINDS, TUNED
from pipelines.settings.sections import Settings
from pipelines.storage import local_copy
from pipelines.training.files import CHECKPOINT, COMPUTED_ON
from pipelines.training.hardware import computed_on
from pipelines.training.problem import problem_of
from pipelines.training.weights import load_teacher, stage_tensors


class ArmEvaluator:
    """Holds the models of all arms and runs each batch through all of them."""

    def __init__(
        self,
        *,
        sources: Sequence[Mapping[str, Any]],
        settings: Mapping[str, Any],
        manifest: Mapping[str, Any],
        batch_size: int,
        threads: int,
        device: str,
        workers: int,
    ) -> None:
        """`device` is "cpu" or "cuda"; `workers` is the number of evaluators beside each other."""
        torch.set_num_threads(threads)
        resolved = Settings.model_validate(dict(settings))
        short_side = resolved.data.stored_short_side
        problem = problem_of(Manifest.model_validate(manifest), short_side)
        self.problem, self.batch_size = problem, batch_size
        self.device = torch.device(device)
        with full_float32(device):
            self.computed_on = computed_on(self.device, bf16=False, workers=workers)
        # Each arm with its loaded model, and what its client costs: the same for all images.
        self.arms: list[tuple[ArmSource, Any, dict[str, int]]] = []
        loaded: dict[str, Any] = {}
        for entry in sources:
            source = ArmSource(**entry)
            # Arms that share weights share one loaded model.
            key = f"{ARM_KINDS[source.kind].loads}:{source.folder}"
            if key not in loaded:
                loaded[key] = _load(source, resolved, problem).to(self.device).eval()
            self.arms.append((source, loaded[key], client_cost(source, loaded[key], problem)))

    def __call__(self, batch: Arrays) -> Arrays:
        """Returns the rows of all arms for a batch of the reader, one arm after the other."""
        images = torch.from_numpy(np.array(batch["image"]))  # Ray's arrays cannot be written to
        count = len(images)
        if (
            count < self.batch_size
        ):  # the last batch has the same shape: an answer must not depend on it
            images = torch.cat([images, images[:1].expand(self.batch_size - count, -1, -1, -1)])
        images = images.to(self.device)
        parts = []
        with torch.no_grad(), full_float32(self.device.type):
            coded = self._coded(images, batch)
        for number, (source, model, cost) in enumerate(self.arms):
            with torch.no_grad(), full_float32(self.device.type):
                kind = ARM_KINDS[source.kind].answers
                if source.quality is not None:
                    rows = run_image_codec(model, images, batch, self.problem, source)
                elif isinstance(model, Mantis) and adds(model, self.problem):
                    rows = run_added(coded[number], batch, self.problem)
                elif kind in CODED:
                    rows = CODED[kind](coded[number], batch, self.problem)
                elif source.level is not None:
                    rows = run_per_task(model, images, batch, self.problem, level=source.level)
                else:
                    rows = ANSWERS[kind](model, images, batch, self.problem)
            rows = with_pixels_summed({name: values[:count] for name, values in rows.items()})
            rows["arm"] = np.full(count, number)
            for name in ("client_macs", "client_bytes"):
                rows[name] = np.full(count, cost.get(name, -1))
            parts.append(rows)
        out = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for name in ("row_id", "class_label", "labels", "task_mask"):
            out[name] = np.concatenate([batch[name]] * len(parts))
        out[COMPUTED_ON] = np.full(len(out["arm"]), "", dtype=object)
        out[COMPUTED_ON][0] = json.dumps(self.computed_on)  # once in a batch
        return out

    def _coded(self, images: Tensor, batch: Arrays) -> dict[int, list[Coded]]:
        """Returns the streams and answers of each arm that is a codec, by the arm's number.

        Arms of one model share what they have in common: an image passes the client's first layers
        once, and a stream that several of them send is made and answered once.
        """
        together: dict[int, list[int]] = {}
        for number, (source, model, _) in enumerate(self.arms):
            if ARM_KINDS[source.kind].answers in CODED:
                together.setdefault(id(model), []).append(number)
        found: dict[int, list[Coded]] = {}
        for numbers in together.values():
            model = self.arms[numbers[0]][1]
            sources = [self.arms[number][0] for number in numbers]
            ways = [ways_of(source, model, len(images), batch, self.problem) for source in sources]
            coded = iter(code(model, images, [way for own in ways for way in own]))
            for number, own in zip(numbers, ways, strict=True):
                found[number] = list(islice(coded, len(own)))
        return found


def client_cost(source: ArmSource, model: nn.Module, problem: Problem) -> dict[str, int]:
    """Returns multiply-adds and bytes of an arm's client, {} for an arm without one client.

    A student that sends no answer of its own needs no detector.
    """
    if isinstance(model, LocalClassifier):
        return model.cost(problem.image_size)
    if not isinstance(model, Mantis):
        return {}
    found = model.client_codec().describe()
    is_student = ARM_KINDS[source.kind].answers == "student"
    if is_student and source.exit_confidence is None and not model.spec.sends_answer:
        found["client_macs"] -= found["detector_macs"]
    return found


def run_local(model: LocalClassifier, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """Runs a classifier on the device. Its answer is what is sent: to each request where asked."""
    outputs, size = model(normalise(images), coarse=True), problem.image_size
    rows = blank(len(images), problem.tasks)
    rows["decoded"][: len(batch["task_mask"])] = batch["task_mask"]
    rows["answered"][:] = True
    if not model.asked:
        sure, classes = (x.cpu() for x in torch.softmax(outputs["logits"], dim=1).max(dim=1))
        rows["class_index"] = rows["client_class"] = classes.numpy()
        every = [len(problem.classes)]
        for index, (label, probability) in enumerate(
            zip(classes.tolist(), sure.tolist(), strict=True)
        ):
            sent = label_sizes(label, 0, every, size, sure=probability)
            for name, value in sent._asdict().items():
                rows[name][index] = value
        return with_labels_of_class(rows, problem.tasks)
    rows["decoded"][:] = True
    sizes = {name: np.full(rows["predicted"].shape, -1.0) for name in Sizes._fields}
    counts = [task.num_classes * task.is_classification for task in problem.tasks]
    for k, task in enumerate(problem.tasks):
        own = outputs.get(f"logits/{task.name}")
        labels = (outputs["logits"][:, list(task.classes)] if own is None else own).argmax(dim=1)
        for index, said in enumerate(labels.cpu()):
            if task.is_classification:
                rows["predicted"][index, k] = said
                sent = label_sizes(int(said), k, counts, size)
            else:
                sent = mask_sizes(said.numpy())
            for name, value in sent._asdict().items():
                sizes[name][index, k] = value
        if not task.is_classification:
            masks = interpolate(labels[:, None].float(), size=size)[:, 0].to(torch.uint8)
            for index, mask in enumerate(masks[: len(batch["task_mask"])].cpu().numpy()):
                count_pixels(rows, index, batch, (task,), {task.name: mask})
    return with_request_sizes(rows, sizes)


def run_per_task(
    codecs: PerTaskCodecs,
    images: Tensor,
    batch: Arrays,
    problem: Problem,
    *,
    level: int | None = None,
) -> Arrays:
    """Runs the codec of each true task of an image. Sums the bytes of all of them.

    Of codecs that are asked, each for its task: the mean over the tasks that an image carries.
    """
    rows = blank(len(images), problem.tasks)
    sizes = {name: np.full(rows["predicted"].shape, -1.0) for name in SIZES}
    carried, asked = batch["task_mask"], False
    rows["decoded"][: len(carried)] = carried
    for k, task in enumerate(problem.tasks):
        codec: Any = codecs[task.name]
        own = np.flatnonzero(carried[:, k])
        if not len(own):
            continue
        asked = codec.spec.model.requests == "asked"
        some = images[torch.from_numpy(own)]
        encoded = codec.encode_in_detail(some, task.name if asked else None, level=level)
        answers = codec.decode([each.data for each in encoded])
        for index, sent, answer in zip(own, encoded, answers, strict=True):
            sizes["wire_bytes"][index, k] = len(sent.data)
            for name in ("payload_bytes", "session_bytes", "estimated_bits"):
                sizes[name][index, k] = getattr(sent, name)
            if task.is_classification:
                rows["predicted"][index, k] = answer.labels[task.name]
                if problem.single_class:
                    rows["class_index"][index] = task.classes[answer.labels[task.name]]
            count_pixels(rows, index, batch, (task,), answer.segmentation)
    if asked:
        return with_request_sizes(rows, sizes)
    for name, each in sizes.items():
        rows[name] = np.where(each >= 0, each, 0).sum(axis=1)
    return rows


def run_teacher(model: Teacher, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """Runs the uncompressed teacher: its flat logits, or the head of each task."""
    outputs = model(normalise(images))
    rows = blank(len(images), problem.tasks)
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
    """Encodes every image to a file, decodes it and runs the teacher. The file is what is sent.

    In a session both ends could agree on the headers of files: what is left counts there.
    """
    codec = IMAGE_CODECS[source.kind.removesuffix(TUNED)]
    assert source.quality is not None
    pixels, scale = images.permute(0, 2, 3, 1).cpu().numpy(), source.scale or 1.0
    pairs = [coded_at(codec, image, source.quality, scale) for image in pixels]
    files, decoded = [data for data, _ in pairs], torch.from_numpy(np.stack([x for _, x in pairs]))
    rows = run_teacher(model, decoded.permute(0, 3, 1, 2).to(images.device), batch, problem)
    rows["probabilities"][:] = -1.0  # nothing is detected
    rows["wire_bytes"][:] = [len(data) for data in files]
    coded = [codec.coded_bytes(data) for data in files]
    rows["payload_bytes"][:] = rows["session_bytes"][:] = coded
    return rows


def run_individual(model: TaskModules, images: Tensor, batch: Arrays, problem: Problem) -> Arrays:
    """Runs one uncompressed network for each task on the images of that task."""
    pixels = normalise(images)
    outputs = {
        f"logits/{task.name}": model[task.name](pixels)[f"logits/{task.name}"]
        for task in problem.tasks
    }
    return _with_heads(blank(len(images), problem.tasks), outputs, batch, problem.tasks)


def _group_posteriors(logits: Tensor, tasks: Sequence[TaskSpec]) -> np.ndarray[Any, Any]:
    """Returns the probability of each task (B, K): the softmax summed over its classes."""
    soft = torch.softmax(logits.float(), dim=1)
    groups = [soft[:, list(task.classes)].sum(dim=1) for task in tasks]
    return torch.stack(groups, dim=1).cpu().numpy()


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
                count_pixels(rows, index, batch, [task], {task.name: masks[index]})
    return rows


def _load(source: ArmSource, settings: Settings, problem: Problem) -> nn.Module:
    loads = ARM_KINDS[source.kind].loads
    if loads == "teacher" and not source.kind.endswith(TUNED):
        return load_teacher(settings, problem, source.folder)
    assert source.folder is not None
    if loads == "local":
        classifier = local_classifier(settings.model, problem)
        classifier.load_state_dict(stage_tensors(source.folder))
        return classifier
    if loads in ("teacher", "individual"):
        teacher = new_teacher(settings.teacher, problem)
        model = teacher if loads == "teacher" else individual_models(teacher, problem.image_size)
        model.load_state_dict(stage_tensors(source.folder))
        return model
    with local_copy(source.folder) as folder:
        inner = folder / CHECKPOINT
        if loads == "per_task":
            return load_codecs(inner)
        return load_model(inner if inner.is_dir() else folder)


ANSWERS: dict[str, Callable[[Any, Tensor, Arrays, Problem], Arrays]] = {
    "local": run_local,
    "per_task": run_per_task,
    "individual": run_individual,
    "teacher": run_teacher,
}
"""The functions that `ArmKind.answers` names, of arms that are no codec (those: coded.py)."""
