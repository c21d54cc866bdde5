"""A tiny world for the tests of mantis_core: tasks, batches, a random teacher, small codecs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from mantis_core.architecture import (
    ConditioningConfig,
    DecoderConfig,
    DetectorConfig,
    EncoderConfig,
    ModelConfig,
    StemConfig,
)
from mantis_core.codec.mantis import Mantis
from mantis_core.config import OptimConfig, Stage1Config, Stage2Config
from mantis_core.tasks import IGNORE, Batch, Problem, TaskSpec
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.stage1 import Stage1Recipe, stage1_recipe
from mantis_core.training.stage2 import Stage2Recipe, stage2_recipe
from tests.mantis_core.narrow_resnet import NAME

SIZE = 32
TASKS = (
    TaskSpec("animals", "classification", 3, (0, 1, 2), ("cat", "dog", "owl")),
    TaskSpec("tools", "classification", 2, (3, 4), ("saw", "knife")),
    TaskSpec("kitchen", "classification", 2, (4, 5), ("knife", "spoon")),
)
GROUND = TaskSpec("ground", "segmentation", 3)


def make_problem(*, single_class: bool = True, names: tuple[str, ...] = ()) -> Problem:
    """Six classes, one of them in two tasks; without `single_class` also a segmentation task.

    `names` are other names for the first tasks.
    """
    tasks = TASKS if single_class else (*TASKS, GROUND)
    renamed = tuple(replace(task, name=name) for task, name in zip(tasks, names, strict=False))
    return Problem(
        tasks=(*renamed, *tasks[len(renamed) :]),
        classes=tuple(f"c{i}" for i in range(6)),
        class_names=("cat", "dog", "owl", "saw", "knife", "spoon"),
        single_class=single_class,
        image_size=(SIZE, SIZE),
        short_side=SIZE,
    )


def make_config(**changes: object) -> ModelConfig:
    """A codec of a few thousand parameters; `changes` are keys of the model section."""
    small = ModelConfig(
        stem=StemConfig(channels=(8, 8)),
        detector=DetectorConfig(channels=8, blocks=0, hidden=8),
        conditioning=ConditioningConfig(hidden=8),
        encoder=EncoderConfig(channels=8, blocks=1, latent_channels=4),
        decoder=DecoderConfig(channels=8, blocks=1, task_channels=8),
    )
    return small.model_copy(update=changes)


def make_batch(
    problem: Problem, count: int = 8, seed: int = 0, classes: tuple[int, ...] = tuple(range(6))
) -> Batch:
    """Random images whose class is one of `classes`; segmentation on every other image."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    pick = torch.randint(0, len(classes), (count,), generator=draw)
    class_label = torch.tensor(classes)[pick]
    labels = torch.full((count, len(problem.tasks)), -1)
    mask = torch.zeros(count, len(problem.tasks), dtype=torch.bool)
    segmentation: dict[str, Tensor] = {}
    for k, task in enumerate(problem.tasks):
        if task.is_classification:
            for i, label in enumerate(class_label.tolist()):
                if label in task.classes:
                    labels[i, k] = task.classes.index(label)
            mask[:, k] = labels[:, k] >= 0
        else:
            mask[::2, k] = True
            truth = torch.randint(0, task.num_classes, (count, SIZE, SIZE), generator=draw)
            truth[:, :4] = IGNORE
            segmentation[task.name] = truth.to(torch.uint8)
    if not problem.single_class:
        class_label = torch.full_like(class_label, -1)
    return Batch(image, class_label, labels, mask, segmentation, torch.arange(count))


@cache
def _first_teacher(network: str, single_class: bool, tasks: tuple[TaskSpec, ...]) -> Teacher:
    torch.manual_seed(0)
    return Teacher(
        network,
        split="layer2",
        tasks=tasks,
        flat_classes=6 if single_class else 0,
        image_size=(SIZE, SIZE),
    ).eval()


def make_teacher(problem: Problem, network: str = NAME) -> Teacher:
    """A ResNet with random weights, a flat head where images have one class.

    Take "resnet18" for what another process loads: it does not know the narrow one.
    """
    return copy.deepcopy(_first_teacher(network, problem.single_class, problem.tasks))


QUICK = {"epochs": 2, "batch_size": 4, "ema_decay": 0.9, "optim": OptimConfig(lr=1e-2)}


def make_stage1(
    problem: Problem,
    model: ModelConfig | None = None,
    *,
    seed: int = 0,
    network: str = NAME,
    **changes: object,
) -> Stage1Recipe:
    """Stage 1 on the small codec; `changes` are keys of the stage1 section."""
    config = Stage1Config(**{**QUICK, **changes})  # type: ignore[arg-type]
    teacher = make_teacher(problem, network)
    recipe = stage1_recipe(config, model or make_config(), teacher, problem, seed=seed)
    assert isinstance(recipe, Stage1Recipe)
    return recipe


def make_stage2(
    problem: Problem,
    model: ModelConfig | None = None,
    *,
    seed: int = 0,
    network: str = NAME,
    **changes: object,
) -> Stage2Recipe:
    """Stage 2 on the small codec, over an untrained stage 1."""
    config = Stage2Config(**{**QUICK, **changes})  # type: ignore[arg-type]
    recipe = stage2_recipe(
        config,
        model or make_config(),
        make_teacher(problem, network),
        problem,
        make_stage1(problem, model, seed=seed, network=network).student.shipped(),
        seed=seed,
    )
    assert isinstance(recipe, Stage2Recipe)
    return recipe


def make_codec(problem: Problem, model: ModelConfig | None = None, network: str = NAME) -> Mantis:
    """A finished codec with random weights, whose latents and modulation are not trivial."""
    codec = make_stage2(problem, model, network=network).student
    with torch.no_grad():
        codec.client.encoder.to_latent.weight.mul_(8)
        for parameter in codec.client.conditioning.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    codec.finish()
    return codec


@pytest.fixture
def problem() -> Problem:
    return make_problem()


@pytest.fixture
def mixed_problem() -> Problem:
    """With a segmentation task, images without one class."""
    return make_problem(single_class=False)


@pytest.fixture
def teacher(problem: Problem) -> Teacher:
    return make_teacher(problem)


@pytest.fixture
def batch(problem: Problem) -> Batch:
    return make_batch(problem)


@pytest.fixture
def batch_of() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture
def small_config() -> Callable[..., ModelConfig]:
    return make_config


@pytest.fixture
def stage1_of() -> Callable[..., Stage1Recipe]:
    return make_stage1


@pytest.fixture
def stage2_of() -> Callable[..., Stage2Recipe]:
    return make_stage2


@pytest.fixture
def codec_of() -> Callable[..., Mantis]:
    return make_codec


@pytest.fixture
def codec(problem: Problem) -> Mantis:
    return make_codec(problem)
