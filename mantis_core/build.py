"""From config sections and task specs to teachers, students and recipes. Trains nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mantis_core.client import latent_size
from mantis_core.config import (
    CodecTeacherConfig,
    ModelConfig,
    Stage1Config,
    Stage2Config,
)
from mantis_core.config import TeacherConfig as TeacherConfig
from mantis_core.errors import ModelError
from mantis_core.losses import DETECTION
from mantis_core.model import Mantis
from mantis_core.per_task import PerTaskRecipe
from mantis_core.recipes import Recipe, Stage1Recipe, Stage1Student, Stage2Recipe
from mantis_core.server import ClassificationTail
from mantis_core.spec import ModelSpec
from mantis_core.tasks import TaskSpec
from mantis_core.teacher import (
    Teacher,
    flat_teacher,
    freeze,
    load_backbone,
    load_teacher_file,
    narrowed,
)
from mantis_core.uncompressed_recipes import (
    CodecTeacherRecipe,
    IndividualRecipe,
    TeacherRecipe,
    individual_models,
)


@dataclass(frozen=True)
class Problem:
    """What the data asks of a model: tasks, classes, input size.

    `imagenet_indices` are the classes' ImageNet-1k indices, where all have one.
    """

    tasks: tuple[TaskSpec, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    single_class: bool
    image_size: tuple[int, int]
    short_side: int
    imagenet_indices: tuple[int, ...] | None = None


def new_teacher(config: TeacherConfig, problem: Problem) -> Teacher:
    """An untrained teacher: one flat head where each image has one class, else a head a task."""
    return Teacher(
        config.name,
        split=config.split,
        tasks=problem.tasks,
        flat_classes=len(problem.classes) if problem.single_class else 0,
        image_size=problem.image_size,
    )


def ready_teacher(
    config: TeacherConfig, problem: Problem, trained: Mapping[str, Tensor] | None
) -> Teacher:
    """The frozen teacher: `trained` by its own stage, pretrained by torchvision, or from a file.

    Raises ModelError where weights and data do not fit.
    """
    if config.weights == "train":
        assert trained is not None
        teacher = new_teacher(config, problem)
        teacher.load_state_dict(dict(trained))
        return teacher
    state = None if config.weights == "pretrained" else load_teacher_file(config.weights)
    teacher = flat_teacher(
        config.name,
        state,
        split=config.split,
        num_classes=len(problem.classes),
        imagenet_indices=problem.imagenet_indices,
        image_size=problem.image_size,
    )
    teacher.tasks = tuple(problem.tasks)
    return teacher


def teacher_recipe(config: TeacherConfig, problem: Problem, *, seed: int) -> Recipe:
    """Stage `teacher`, from random weights or from the backbone in `config.start`."""
    torch.manual_seed(seed)
    teacher = new_teacher(config, problem)
    if config.start is not None:
        load_backbone(teacher, load_teacher_file(config.start))
    return TeacherRecipe(teacher, config)


def codec_teacher_recipe(config: CodecTeacherConfig, teacher: Teacher) -> Recipe:
    """The baseline: `teacher`, trained already, fine-tuned on decoded images."""
    return CodecTeacherRecipe(teacher.requires_grad_(True), config)


def stage1_recipe(
    config: Stage1Config, model: ModelConfig, teacher: Teacher, problem: Problem, *, seed: int
) -> Recipe:
    """Stage 1: a task-agnostic codec in front of the teacher's frozen tail."""
    spec = model_spec(model, teacher, problem)
    torch.manual_seed(seed)
    student = Stage1Student(
        model,
        len(spec.tasks),
        image_size=spec.image_size,
        split_shape=spec.split_shape,
        latent_size=latent_size(spec.image_size, model.encoder.stride),
        tail=teacher.backbone.tail_after(teacher.split),
        members=spec.class_members(),
    )
    return Stage1Recipe(student, teacher, config)


def stage2_recipe(
    config: Stage2Config,
    model: ModelConfig,
    teacher: Teacher,
    problem: Problem,
    stage1: Mapping[str, Tensor],
    *,
    seed: int,
) -> Recipe:
    """Stage 2: the whole codec, from stage 1's weights and the teacher's tail and rows.

    Raises ModelError where one task of all classes is asked for and images have no single class.
    """
    torch.manual_seed(seed)
    if model.per_task:
        return _per_task_recipe(config, model, teacher, problem, stage1)
    if model.single_task:
        problem = one_task(problem)
    return Stage2Recipe(_started_codec(model, teacher, problem, stage1), teacher, config)


def _started_codec(
    model: ModelConfig, teacher: Teacher, problem: Problem, stage1: Mapping[str, Tensor]
) -> Mantis:
    trunk = teacher.backbone.tail_after(teacher.split).requires_grad_(True)  # it may be frozen
    codec = Mantis(model_spec(model, teacher, problem), trunk=trunk)
    start_from_stage1(codec, stage1)
    start_tails_from_teacher(codec, teacher)
    return codec


def _per_task_recipe(
    config: Stage2Config,
    model: ModelConfig,
    teacher: Teacher,
    problem: Problem,
    stage1: Mapping[str, Tensor],
) -> Recipe:
    """A codec a task; with nothing to detect its detector is left alone."""
    losses = {n: term for n, term in config.losses.items() if term.criterion not in DETECTION}
    if not losses:
        raise ModelError("stage2.losses: codecs of one task each need a term that is no detection")
    config = config.model_copy(update={"losses": losses})
    model = model.model_copy(
        update={
            "per_task": False,
            "send_probabilities": False,
            "detector": model.detector.model_copy(update={"classes": False}),
        }
    )
    parts = {}
    for task in problem.tasks:
        known = narrowed(teacher, task)
        codec = _started_codec(model, known, of_task(problem, task), stage1)
        freeze(codec.client.detector)
        parts[task.name] = Stage2Recipe(codec, known, config)
    return PerTaskRecipe(parts, problem.tasks)


def individual_recipe(teacher: Teacher, problem: Problem, *, seed: int) -> Recipe:
    """The uncompressed baseline: one network a task."""
    torch.manual_seed(seed)
    return IndividualRecipe(individual_models(teacher, problem.image_size), problem.tasks)


def model_spec(model: ModelConfig, teacher: Teacher, problem: Problem) -> ModelSpec:
    """The spec of the codec for these sections."""
    split_shape, last_shape = teacher.feature_shapes(problem.image_size)
    return ModelSpec(
        model=model,
        tasks=problem.tasks,
        classes=problem.classes,
        class_names=problem.class_names,
        single_class=problem.single_class,
        image_size=problem.image_size,
        short_side=problem.short_side,
        teacher=teacher.name,
        split=teacher.split,
        split_shape=split_shape,
        last_shape=last_shape,
    )


def one_task(problem: Problem) -> Problem:
    """The problem with all its classes as one task. ModelError if images have no single class."""
    if not problem.single_class:
        raise ModelError(
            "model.single_task needs images of one class each; this data has images of several "
            "tasks: leave out the baseline `student`"
        )
    labels = tuple(problem.class_names)
    every = TaskSpec("all", "classification", len(labels), tuple(range(len(labels))), labels)
    return replace(problem, tasks=(every,))


def of_task(problem: Problem, task: TaskSpec) -> Problem:
    """The problem of the images that carry one task, whose labels are their classes."""
    if not task.is_classification:
        return replace(problem, tasks=(task,), classes=(), class_names=(), single_class=False)
    alone = replace(task, classes=tuple(range(task.num_classes)))
    classes = tuple(problem.classes[c] for c in task.classes)
    return replace(
        problem, tasks=(alone,), classes=classes, class_names=task.labels, single_class=True
    )


_FROM_STAGE1 = (
    "client.stem",
    "client.encoder",
    "client.detector",
    "server.decoder.",
)


def start_from_stage1(model: Mantis, stage1: Mapping[str, Tensor]) -> None:
    """Loads stem, encoder, detector, density (every row alike) and decoder of stage 1.

    A detector of another number of tasks keeps its own last layer.
    """
    own = model.state_dict()
    start: dict[str, Tensor] = {}
    for name, value in stage1.items():
        if name.startswith("bottleneck.table"):
            continue
        target = f"server.{name}" if name.startswith("decoder.") else name
        if target.startswith("bottleneck.density.") and target in own:
            rows = own[target].shape[0] // max(1, value.shape[0]) if value.ndim else 1
            value = value.repeat(rows, *([1] * (value.ndim - 1))) if rows > 1 else value
        if target in own and own[target].shape == value.shape:
            start[target] = value
    missing = [
        name
        for name in own
        if name.startswith(_FROM_STAGE1)
        and (name not in start and own[name].shape[:1] != (len(model.spec.tasks),))
    ]
    assert not missing, f"stage 1 lacks {missing[:3]}"
    model.load_state_dict({**own, **start})


def start_tails_from_teacher(model: Mantis, teacher: Teacher) -> None:
    """Each tail starts from the teacher's own head or rows, "not mine" from nothing."""
    with torch.no_grad():
        for task in model.spec.tasks:
            own = model.server.tails[task.name]
            if not task.is_classification:
                if task.name in teacher.heads:
                    own.load_state_dict(teacher.heads[task.name].state_dict())
                continue
            assert isinstance(own, ClassificationTail)
            tail = own.linear
            if teacher.flat_classes:
                rows = torch.tensor(task.classes)
                weight, bias = teacher.flat_head.weight[rows], teacher.flat_head.bias[rows]
            elif task.name in teacher.heads:
                head = teacher.heads[task.name]
                assert isinstance(head, nn.Linear)
                weight, bias = head.weight, head.bias
            else:
                continue
            tail.weight[:-1].copy_(weight)
            tail.bias[:-1].copy_(bias)
            tail.weight[-1].zero_()
            tail.bias[-1].fill_(0.0)
