"""Counts what a training step asks of the device, and measures how busy a GPU is with it.

    python -m benchmarks.step [--config configs/imagenet.yaml] [--tasks 2,12,48] [key=value ...]

The step is `Session.step` of stage 2 of the config, on random images and with a teacher of random
weights, so neither data nor a download is needed. It is counted on the CPU with small images:
neither the size of images nor the device changes an operation. The optimiser is that of a GPU.

- `forward`, `backward` and `update`: operations that reach PyTorch's dispatcher. `update` is
  clipping, optimiser and moving average. `views` are those of all three that compute nothing.
- `graphs`, of both stages with the smallest number of tasks: into how many parts torch.compile cuts
  forward pass and loss. Nothing is compiled.
- `synchronisations`: operations of a step that would make the CPU wait for a GPU, such as reading
  a number or selecting rows by a boolean mask.

With a GPU, stage 1 and stage 2 are also timed there, with `--pixels` and `--batch`: images per
second, and the share of the time in which a kernel runs. Both stages take the largest number of
tasks up to 12. The last line is one JSON object. Without a GPU its `gpu` is null.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.program import count, listed, one_message, say
from mantis_core.tasks import Batch, Problem, TaskSpec, class_members
from mantis_core.teachers.teacher import Teacher
from mantis_core.training.loop import Session
from mantis_core.training.recipe import Recipe
from mantis_core.training.stage1 import Stage1Student, stage1_recipe
from mantis_core.training.stage2 import stage2_recipe
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import Settings

FEWEST = 10  # labels of a task; others have up to 6 more
WARM_UP, TIMED = 8, 16  # steps on a GPU
PLACES = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item"}
"""Operations whose result, or its shape, the CPU reads from the device."""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations while it is entered: all of them, views, and synchronisations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.views = 0
        self.synchronisations: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.views += func.is_view
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in PLACES or (name in ("index", "index_put", "index_put_") and _by_mask(args[1])):
            self.synchronisations[name] = self.synchronisations.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def problem_with(tasks: int, pixels: int) -> Problem:
    """Returns a problem of `tasks` classifications, of different numbers of classes."""
    specs: list[TaskSpec] = []
    first = 0
    for k in range(tasks):
        labels = FEWEST + k % 7
        classes = tuple(range(first, first + labels))
        specs.append(TaskSpec(f"task{k}", "classification", labels, classes))
        first += labels
    names = tuple(f"class{c}" for c in range(first))
    return Problem(tuple(specs), names, names, True, (pixels, pixels), pixels)


def random_batch(problem: Problem, images: int, device: str) -> Batch:
    """Returns random images, each of one random class."""
    draw = torch.Generator().manual_seed(0)
    class_label = torch.randint(0, len(problem.classes), (images,), generator=draw)
    first = torch.tensor([task.classes[0] for task in problem.tasks])
    mask = class_members(problem.tasks, len(problem.classes)).T[class_label]
    labels = torch.where(mask, class_label[:, None] - first, -1)
    size = (images, 3, *problem.image_size)
    image = torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)
    row_id = torch.arange(images)
    tensors = (x.to(device) for x in (image, class_label, labels, mask, row_id))
    image, class_label, labels, mask, row_id = tensors
    return Batch(image, class_label, labels, mask, {}, row_id)


def session_of(settings: Settings, stage: str, problem: Problem, device: str) -> Session:
    """Returns the training of a stage, about to take its first step, with random weights."""
    torch.manual_seed(0)
    teacher = Teacher(
        settings.teacher.name,
        split=settings.teacher.split,
        tasks=problem.tasks,
        flat_classes=len(problem.classes),
        image_size=problem.image_size,
    )
    first = settings.stage1.model_copy(update={"start": "random"})
    recipe: Recipe = stage1_recipe(first, settings.model, teacher, problem, seed=0)
    config = getattr(settings, stage)
    if stage == "stage2":
        assert isinstance(recipe.student, Stage1Student)
        started = recipe.student.shipped()
        recipe = stage2_recipe(config, settings.model, teacher, problem, started, seed=0)
    session = Session(recipe, config, steps_per_epoch=1000, seed=0, device=device)
    session.recipe.train()
    return session


def counted(session: Session, batch: Batch) -> dict[str, Any]:
    """Returns the counts of one step."""
    for group in session.optimizer.param_groups:
        if "fused" in group:
            group["fused"], group["foreach"] = True, False  # as on a GPU
    session.step(batch)  # the first makes the optimiser's state
    session.optimizer.zero_grad()
    forward, backward, whole = Counter(), Counter(), Counter()
    with forward:
        output = session.forward(batch, 0.0)
    with backward:
        output.loss.backward()  # type: ignore[no-untyped-call]
    with whole:
        session.step(batch)
    return {
        "forward": forward.operations,
        "backward": backward.operations,
        "update": whole.operations - forward.operations - backward.operations,
        "views": whole.views,
        "synchronisations": whole.synchronisations,
    }


def graphs_of(session: Session, batch: Batch) -> int:
    """Into how many graphs torch.compile cuts a step's forward pass and loss."""
    found: list[Callable[..., Any]] = []

    def uncompiled(graph: Any, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(session.recipe.forward, backend=uncompiled)(batch, 0.0)
    return len(found)


def timed(session: Session, batch: Batch) -> dict[str, float]:
    """Returns images per second, and the share of the time in which the GPU runs a kernel."""
    for _ in range(WARM_UP):
        session.step(batch)
    seconds = _seconds(lambda: session.step(batch))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(TIMED):
            session.step(batch)
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
    return {
        "images_per_s": round(TIMED * len(batch) / seconds, 1),
        "busy_share": round(kernels / seconds, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


@one_message
def main() -> int:
    """Counts a step for each number of tasks, then times both stages where there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/imagenet.yaml")
    parser.add_argument("--tasks", type=listed(int), default=(2, 12, 48), metavar="K,K,...")
    parser.add_argument("--pixels", type=count, default=224, help="image side on a GPU")
    parser.add_argument("--batch", type=count, default=256, help="images of a step on a GPU")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    settings = load_settings(arguments.config, arguments.overrides)
    counts = {}
    for tasks in arguments.tasks:
        problem = problem_with(tasks, 64)
        session = session_of(settings, "stage2", problem, "cpu")
        counts[tasks] = counted(session, random_batch(problem, 4, "cpu"))
        say(f"{tasks} tasks: {counts[tasks]}")
    problem = problem_with(min(arguments.tasks), 64)
    batch = random_batch(problem, 4, "cpu")
    graphs = {
        stage: graphs_of(session_of(settings, stage, problem, "cpu"), batch)
        for stage in ("stage1", "stage2")
    }
    say(f"graphs: {graphs}")
    gpu = None
    if torch.cuda.is_available():
        tasks = max((k for k in arguments.tasks if k <= 12), default=min(arguments.tasks))
        problem = problem_with(tasks, arguments.pixels)
        batch = random_batch(problem, arguments.batch, "cuda")
        gpu = {"device": torch.cuda.get_device_name(), "tasks": tasks}
        for stage in ("stage1", "stage2"):
            torch.cuda.reset_peak_memory_stats()
            gpu[stage] = timed(session_of(settings, stage, problem, "cuda"), batch)
            say(f"{stage}: {gpu[stage]}")
    else:
        say("there is no GPU here, so no step is timed")
    print(json.dumps({"counts": counts, "graphs": graphs, "gpu": gpu}))
    return 0


def _seconds(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


if __name__ == "__main__":
    sys.exit(main())
