"""Right answers of one batch as sums, for the figures of a training epoch.

The figures of a whole evaluation are in `measure/metrics.py`.

Shapes: B batch, K tasks, n labels of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mantis_core.networks.stacked import TaskLayout, as_stacked
from mantis_core.tasks import Batch, TaskSpec


def label_hits(
    outputs: Mapping[str, Tensor], tasks: Sequence[TaskSpec], batch: Batch
) -> dict[str, Tensor]:
    """Right answers and questions, as sums "top1/hits" and "top1/asked"; empty without logits."""
    if "logits" in outputs:
        known = batch.class_label >= 0
        hits = (outputs["logits"].argmax(dim=1) == batch.class_label) & known
        return {"top1/hits": hits.sum(), "top1/asked": known.sum()}
    said = [
        outputs[f"logits/{task.name}"].argmax(dim=1)
        if task.is_classification and f"logits/{task.name}" in outputs
        else torch.full_like(batch.class_label, -1)
        for task in tasks
    ]
    answers = torch.stack(said, dim=1)
    asked = batch.task_mask & (answers >= 0)
    right = (answers == batch.labels) & asked
    return {"top1/hits": right.sum(), "top1/asked": asked.sum()}


def decision_hits(
    outputs: Mapping[str, Any], layout: TaskLayout, batch: Batch
) -> dict[str, Tensor]:
    """As `label_hits`, but of a codec: through the mask, and joint where images have one class."""
    mask = outputs["mask"]
    exact = (mask == batch.task_mask).all(dim=1).sum()
    first = outputs["task_logits"].argmax(dim=1, keepdim=True)
    right_task = batch.task_mask.gather(1, first).sum()
    sums = {"detection/exact": exact, "detection/first": right_task}
    if "decision" in outputs:
        known = batch.class_label >= 0
        hits = (outputs["decision"] == batch.class_label) & known
        return {**sums, "top1/hits": hits.sum(), "top1/asked": known.sum()}
    answers = as_stacked(outputs["tasks"], layout)
    if answers.log_p is None:
        nothing = torch.zeros_like(exact)
        return {**sums, "top1/hits": nothing, "top1/asked": nothing}
    labels = answers.log_p.masked_fill(~layout.is_label, -torch.inf).argmax(dim=2)
    asked = layout.own(batch.task_mask)
    right = (labels == layout.own(batch.labels)) & asked & layout.own(mask)
    return {**sums, "top1/hits": right.sum(), "top1/asked": asked.sum()}
