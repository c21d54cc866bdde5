"""Compares one step, three epochs and a failure on 1, 2 and 4 gloo processes. Run by a test.

python tests/mantis_core/many_workers.py FOLDER

Every number of workers gets the same rows. What a step draws is the same for every row, and batch
norms keep their statistics: those do differ between workers. Worker 0 writes workers<n>.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conftest import QUICK, make_batch, make_config
from torch import Tensor, nn

from mantis_core.architecture import DetectorConfig
from mantis_core.baselines.per_task import per_task_recipe
from mantis_core.baselines.uncompressed import individual_recipe
from mantis_core.config import LossTerm, OptimConfig, Stage1Config, Stage2Config
from mantis_core.networks.server import still_batch_norms
from mantis_core.tasks import IGNORE, Batch, Problem, TaskSpec
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.loop import Session, TrainingError, fit
from mantis_core.training.stage1 import stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from mantis_core.training.teacher import TeacherConfig, TeacherRecipe
from tests.mantis_core.narrow_resnet import NAME

WORLDS = (1, 2, 4)
ROWS = 16
HELD_BACK = {"many": 11, "few": 3}
SGD = {**QUICK, "epochs": 3, "batch_size": ROWS, "optim": OptimConfig(kind="sgd", lr=1e-2)}


def problem_of(*, single_class: bool) -> Problem:
    """12 tasks of 2 classes, the last class in two tasks; else 2 of the 12 are segmentations."""
    tasks = [
        TaskSpec(f"t{k}", "classification", 2, (2 * k, 2 * k + 1), ("a", "b")) for k in range(12)
    ]
    tasks[0] = replace(tasks[0], num_classes=3, classes=(0, 1, 23), labels=("a", "b", "c"))
    if not single_class:
        tasks[10:] = [TaskSpec(f"s{k}", "segmentation", 2 + k) for k in range(2)]
    names = tuple(f"c{i}" for i in range(24))
    return Problem(tuple(tasks), names, names, single_class, (32, 32), 32)


def batch_of(problem: Problem, rows: int, seed: int) -> Batch:
    """Rows that differ in contrast, in labelled pixels, and in whether they have a class."""
    classes = tuple(range(20)) if problem.tasks[-1].kind == "segmentation" else tuple(range(24))
    batch = make_batch(problem, rows, seed=seed, classes=classes)
    for row in range(rows):
        batch.image[row] //= 1 + row % 4
        for k, truth in enumerate(batch.segmentation.values()):
            truth[row, : 2 * row + k] = IGNORE
    lost = batch.class_label.clone()
    lost[1::5] = -1
    if problem.single_class:
        nobody = lost[:, None] < 0
        return replace(
            batch,
            class_label=lost,
            labels=batch.labels.masked_fill(nobody, -1),
            task_mask=batch.task_mask & ~nobody,
        )
    return batch


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    own = slice(start, stop)
    return Batch(
        batch.image[own],
        batch.class_label[own],
        batch.labels[own],
        batch.task_mask[own],
        {name: truth[own] for name, truth in batch.segmentation.items()},
        batch.row_id[own],
    )


def teacher_of(problem: Problem, *, flat: bool) -> Teacher:
    torch.manual_seed(0)
    teacher = Teacher(
        NAME,
        split="layer2",
        tasks=problem.tasks,
        flat_classes=24 if flat else 0,
        image_size=(32, 32),
    )
    return teacher.eval()


def stage1(problem: Problem, *, flat: bool, **model: Any) -> Any:
    losses = {
        **Stage1Config().losses,
        "squares": LossTerm(criterion="MSELoss", student="decoder", teacher="@split"),
    }
    if model:
        losses["classes"] = LossTerm(criterion="ClassDetection")
    config = Stage1Config(**SGD, losses=losses)
    teacher = teacher_of(problem, flat=flat)
    return stage1_recipe(config, make_config(**model), teacher, problem, seed=0)


def stage2(problem: Problem, *, flat: bool, build: Any = stage2_recipe, **model: Any) -> Any:
    losses = dict(Stage2Config().losses)
    if model:
        losses["classes"] = LossTerm(criterion="ClassDetection")
    config = Stage2Config(
        **SGD, losses=losses, teacher_forcing=(0.5, 0.5), rate_ramp_fraction=0, rate_weight=1e-2
    )
    shipped = stage1(problem, flat=flat, **model).student.shipped()
    teacher = teacher_of(problem, flat=flat)
    return build(config, make_config(**model), teacher, problem, shipped, seed=0)


def cases() -> dict[str, tuple[Problem, Callable[[], Any]]]:
    """A recipe by name, with the problem its batches are of."""
    one, many = problem_of(single_class=True), problem_of(single_class=False)
    few = replace(many, tasks=(*many.tasks[:2], many.tasks[-1]))  # a codec a task costs memory
    names_classes = {"detector": DetectorConfig(channels=8, blocks=0, hidden=8, classes=True)}
    learnt = {"config": TeacherConfig(label_smoothing=0.1)}

    def teacher(problem: Problem, *, flat: bool) -> Any:
        return TeacherRecipe(teacher_of(problem, flat=flat).requires_grad_(True), **learnt)

    def individual() -> Any:
        return individual_recipe(teacher_of(few, flat=False), few, seed=0)

    return {
        "stage1/flat": (one, lambda: stage1(one, flat=True, **names_classes)),
        "stage1/heads": (many, lambda: stage1(many, flat=False)),
        "stage2/flat": (one, lambda: stage2(one, flat=True, **names_classes)),
        "stage2/heads": (many, lambda: stage2(many, flat=False)),
        "stage2/flat, several classes": (many, lambda: stage2(many, flat=True)),
        "per_task": (few, lambda: stage2(few, flat=False, build=per_task_recipe)),
        "teacher/flat": (one, lambda: teacher(one, flat=True)),
        "teacher/heads": (many, lambda: teacher(many, flat=False)),
        "individual": (few, individual),
    }


def one_step(recipe: Any, batch: Batch, rank: int, world: int, first: Path) -> dict[str, float]:
    """The loss of all rows, and how far the gradient is from one worker's, relative to its norm.

    The first number of workers writes its gradient to the file `first`.
    """
    recipe.train()
    still_batch_norms(recipe.student)
    module = nn.parallel.DistributedDataParallel(recipe) if world > 1 else recipe
    share = ROWS // world
    output = module(rows_of(batch, rank * share, (rank + 1) * share), 0.5)
    output.loss.backward()
    loss = output.loss.detach().clone()
    dist.all_reduce(loss)
    gradient = {n: p.grad for n, p in recipe.student.named_parameters() if p.grad is not None}
    if world == 1:
        torch.save(gradient, first)
    wanted: dict[str, Tensor] = torch.load(first, weights_only=True)
    assert gradient.keys() == wanted.keys()
    norm = torch.stack([value.norm() for value in wanted.values()]).norm()
    far = {name: float((gradient[name] - wanted[name]).norm() / norm) for name in wanted}
    return {"loss": float(loss) / world, "gradient": sum(each**2 for each in far.values()) ** 0.5}


def three_epochs(recipe: Any, problem: Problem, held_back: int, rank: int, world: int) -> Any:
    """The figures of all epochs, the epoch chosen and its threshold."""
    with torch.no_grad():
        recipe.student.client.detector.mlp[-1].bias.fill_(-2)  # a threshold below 0.5 is needed
    session = Session(recipe, recipe.config, steps_per_epoch=1, seed=0, rank=rank)
    if world > 1:
        session.distribute(lambda module: nn.parallel.DistributedDataParallel(module))
    share = ROWS // world
    start, stop = (held_back * each // world for each in (rank, rank + 1))
    whole = batch_of(problem, held_back, seed=99)

    def batches(epoch: int) -> list[Batch]:
        batch = batch_of(problem, ROWS, seed=epoch)
        return [rows_of(batch, rank * share, (rank + 1) * share)]

    def holdout() -> Iterator[Batch]:
        size = 4 // world
        for row in range(start, stop, size):
            yield rows_of(whole, row, min(row + size, stop))

    history = list(fit(session, batches, holdout))
    threshold = float(session.best_weights["mask_threshold"])
    return {"history": history, "best": session.best["epoch"], "threshold": threshold}


def failure(rank: int, world: int) -> dict[str, Any]:
    """What each worker is told if the loss of one is not finite at the second step."""
    problem = problem_of(single_class=True)
    recipe = stage1(problem, flat=True)
    session = Session(recipe, recipe.config, steps_per_epoch=3, seed=0, rank=rank)
    if world > 1:
        session.distribute(lambda module: nn.parallel.DistributedDataParallel(module))
    told = ""
    try:
        for step in range(3):
            if step == 1 and rank == world - 1:
                recipe.teacher.flat_head.bias.fill_(torch.inf)
            session.step(batch_of(problem, ROWS // world, seed=step))
    except TrainingError as error:
        told = str(error)
    letters = torch.zeros(200, dtype=torch.uint8)
    letters[: len(told)] = torch.tensor(list(told.encode()), dtype=torch.uint8)
    of_all = [torch.zeros_like(letters) for _ in range(world)]
    dist.all_gather(of_all, letters)
    return {"told": [bytes(each.tolist()).decode().strip("\0") for each in of_all]}


def worker(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.rand = lambda *size, device=None: torch.full(  # type: ignore[assignment]
        size[0] if isinstance(size[0], torch.Size) else size, 0.3, device=device
    )
    torch.rand_like = lambda like: torch.full_like(like, 0.3)  # type: ignore[assignment]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet{world}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),
    )
    found: dict[str, Any] = {}
    for number, (name, (problem, build)) in enumerate(cases().items()):
        first = Path(folder) / f"gradient{number}.pt"
        batch = batch_of(problem, ROWS, seed=7)
        found[name] = one_step(build(), batch, rank, world, first)
    problem = problem_of(single_class=False)
    for name, rows in HELD_BACK.items():
        recipe = stage2(problem, flat=False)
        found[f"epochs/{name}"] = three_epochs(recipe, problem, rows, rank, world)
    found["failure"] = failure(rank, world)
    if rank == 0:
        (Path(folder) / f"workers{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked, not spawned: what is imported above takes seconds and is imported once.
    for processes in WORLDS:
        torch.multiprocessing.start_processes(
            worker, args=(processes, sys.argv[1]), nprocs=processes, start_method="fork"
        )
