"""The baseline of one compressed network a task: what is known of the task is the network itself.

Shapes: B batch, K tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mantis_core.checkpoint import load_folder, save_folder
from mantis_core.errors import ModelError
from mantis_core.model import Mantis
from mantis_core.recipes import Recipe, Stage2Recipe, StepOutput
from mantis_core.spec import ModelSpec
from mantis_core.tasks import Batch, TaskSpec


class PerTaskCodecs(nn.ModuleDict):
    """A codec of one task by that task's name; its classes are the task's labels, in order."""

    def finish(self) -> None:
        """Makes every codec's integer tables; training is over."""
        for codec in self.values():
            codec.finish()  # type: ignore[operator]


class PerTaskRecipe(Recipe):
    """Stage 2 of each task's codec on the images of that task, all in one fit.

    The loss is the mean over the batch's images, an image of several tasks counting for each.
    """

    def __init__(self, parts: Mapping[str, Stage2Recipe], tasks: tuple[TaskSpec, ...]) -> None:
        """`parts` by task, in the order of `tasks`."""
        super().__init__(tasks, {})
        self.student: PerTaskCodecs = PerTaskCodecs(
            {name: part.student for name, part in parts.items()}
        )
        self.parts = nn.ModuleDict(parts)
        self.loaded = tuple(f"{name}.{prefix}" for name in parts for prefix in Stage2Recipe.loaded)

    def train(self, mode: bool = True) -> Self:
        """As usual, each part with the student's own codec."""
        for name, part in self.parts.items():
            part.student = self.student[name]
        super().train(mode)
        return self

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for k, task in enumerate(self.tasks):
            part = self.parts[task.name]
            part.student = self.student[task.name]
            # A task that no image carries is in the graph all the same, or other workers wait.
            carried = batch.task_mask[:, k].nonzero()[:, 0]
            rows = carried if len(carried) else carried.new_zeros(1)
            output: StepOutput = part(_own_rows(batch, rows, k, task), progress)
            counts = len(carried) > 0
            losses.append(output.loss * (len(carried) / len(batch)))
            for name, value in output.sums.items():
                if not name.startswith("detection/"):
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value * counts
        return StepOutput(torch.stack(losses).sum(), sums, len(batch))


def save_codecs(folder: str | Path, codecs: PerTaskCodecs, meta: Mapping[str, Any]) -> None:
    """Finished codecs as one model folder."""
    specs = {name: codec.spec.model_dump(mode="json") for name, codec in codecs.items()}  # type: ignore[union-attr,operator]
    save_folder(folder, codecs.state_dict(), {"kind": "per_task", "codecs": specs}, meta)


def load_codecs(folder: str | Path) -> PerTaskCodecs:
    """What `save_codecs` wrote, in eval mode on CPU. Raises ModelError if it is something else."""
    tensors, config, _ = load_folder(folder)
    try:
        specs = {
            name: ModelSpec.model_validate(spec) for name, spec in dict(config["codecs"]).items()
        }
        codecs = PerTaskCodecs({name: Mantis(spec) for name, spec in specs.items()})
        codecs.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} holds no codecs of one task each: {error}") from None
    return codecs.eval()


def _own_rows(batch: Batch, rows: Tensor, k: int, task: TaskSpec) -> Batch:
    """Rows of a batch with task `k` alone, whose labels are the classes."""
    labels = batch.labels[rows, k]
    masks = {} if task.is_classification else {task.name: batch.segmentation[task.name][rows]}
    return Batch(
        image=batch.image[rows],
        class_label=labels if task.is_classification else torch.full_like(labels, -1),
        labels=labels[:, None],
        task_mask=batch.task_mask[rows, k : k + 1],
        segmentation=masks,
        row_id=batch.row_id[rows],
    )
