"""Tasks side by side: one tensor for the outputs of all classification tasks.

A loop over tasks would start a few kernels for each of them; stacked, their number does not grow
with the tasks. Segmentations are not stacked: each is an output of its own.

Shapes: B batch, K tasks, N classification tasks among them, n labels of a task, W the largest n
plus one, H W input pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mantis_core.tasks import TaskSpec


class TaskLayout(nn.Module):
    """Where each label of a classification task stands in stacked outputs (B, N, W).

    A task's labels come first, then its "not mine", then padding. The buffers move with the module
    that holds the layout, so that a step copies none of them to a GPU. None is in a state dict.

    columns (N,): the task's index among all tasks. not_mine (N,): the place of "not mine".
    is_label, is_output (N, W): True at labels; at labels and at "not mine".
    """

    columns: Tensor
    not_mine: Tensor
    is_label: Tensor
    is_output: Tensor

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        named = [(k, task) for k, task in enumerate(tasks) if task.is_classification]
        self.places = {task.name: (row, task.num_classes) for row, (_, task) in enumerate(named)}
        sizes = torch.tensor([task.num_classes for _, task in named], dtype=torch.int64)
        self.all_tasks = len(named) == len(tasks)
        self.width = max((task.num_classes for _, task in named), default=0) + 1
        place = torch.arange(self.width)
        buffers = {
            "columns": torch.tensor([k for k, _ in named], dtype=torch.int64),
            "not_mine": sizes,
            "is_label": place < sizes[:, None],
            "is_output": place <= sizes[:, None],
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def __len__(self) -> int:
        return len(self.places)

    def own(self, values: Tensor) -> Tensor:
        """The columns of the classification tasks, of values (B, K): (B, N)."""
        return values if self.all_tasks else values.index_select(1, self.columns)


class TaskOutputs(Mapping[str, Tensor]):
    """Outputs by task's name: log P (B, n + 1), or segmentation logits (B, n, H, W).

    `log_p` (B, N, W) holds the former side by side, -inf at padding, as `layout` says. It is None
    where there is no classification task.
    """

    def __init__(
        self, layout: TaskLayout, log_p: Tensor | None, segmentation: Mapping[str, Tensor]
    ) -> None:
        self.layout, self.log_p, self.segmentation = layout, log_p, segmentation

    def __getitem__(self, name: str) -> Tensor:
        if name in self.segmentation:
            return self.segmentation[name]
        row, labels = self.layout.places[name]
        assert self.log_p is not None
        return self.log_p[:, row, : labels + 1]

    def __iter__(self) -> Iterator[str]:
        yield from (*self.layout.places, *self.segmentation)

    def __len__(self) -> int:
        return len(self.layout) + len(self.segmentation)


def as_stacked(outputs: Mapping[str, Tensor], layout: TaskLayout) -> TaskOutputs:
    """Outputs by task as TaskOutputs: themselves, or stacked from a mapping by name."""
    if isinstance(outputs, TaskOutputs):
        return outputs
    log_p = stacked_logits([outputs[name] for name in layout.places], layout.width)
    others = {name: value for name, value in outputs.items() if name not in layout.places}
    return TaskOutputs(layout, log_p, others)


def end_to_end(parameters: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Several parameters joined along a dimension, as torch.cat does it.

    In the backward pass they share one split of the gradient; torch.cat's would cut it by an
    operation for each of them. Along a later dimension the parts are copied at once, for a
    parameter's gradient has the parameter's strides.
    """
    return _EndToEnd.apply(dim, *parameters)  # type: ignore[no-any-return,no-untyped-call]


class _EndToEnd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, *parameters: Tensor) -> Tensor:
        ctx.dim, ctx.sizes = dim, [parameter.shape[dim] for parameter in parameters]
        return torch.cat(parameters, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        split = torch.split_with_sizes_copy if ctx.dim else torch.split_with_sizes
        parts: Any = split(gradients[0], ctx.sizes, ctx.dim)
        return (None, *parts)


def stacked_logits(logits: Sequence[Tensor], width: int) -> Tensor | None:
    """Logits (B, n) of several tasks side by side, (B, N, width), -inf at padding."""
    if not logits:
        return None
    padded = [pad(each, (0, width - each.shape[1]), value=-math.inf) for each in logits]
    return torch.stack(padded, dim=1)
