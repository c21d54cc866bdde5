"""Right answers of one batch as sums, for the figures of a training epoch.

The figures of a whole evaluation are in `measure/metrics.py`.

Shapes: B batch, K tasks, n labels of a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mantis_core.tasks import Batch, TaskSpec


def label_hits(
    outputs: Mapping[str, Tensor], tasks: Sequence[TaskSpec], batch: Batch
) -> dict[str, Tensor]:
    """Right answers and questions, as sums "top1/hits" and "top1/asked"; empty without logits."""
    if "logits" in outputs:
        known = batch.class_label >= 0
        hits = (outputs["logits"].argmax(dim=1) == batch.class_label) & known
        return {"top1/hits": hits.sum(), "top1/asked": known.sum()}
    found = asked = torch.zeros((), dtype=torch.long, device=batch.labels.device)
    for k, task in enumerate(tasks):
        key = f"logits/{task.name}"
        if task.is_classification and key in outputs:
            active = batch.task_mask[:, k]
            right = outputs[key].argmax(dim=1) == batch.labels[:, k]
            found, asked = found + (right & active).sum(), asked + active.sum()
    return {"top1/hits": found, "top1/asked": asked}


def decision_hits(
    outputs: Mapping[str, Any], tasks: Sequence[TaskSpec], batch: Batch
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
    found = asked = torch.zeros((), dtype=torch.long, device=batch.labels.device)
    for k, task in enumerate(tasks):
        if task.is_classification:
            active = batch.task_mask[:, k]
            right = outputs["tasks"][task.name][:, :-1].argmax(dim=1) == batch.labels[:, k]
            found = found + (right & active & mask[:, k]).sum()
            asked = asked + active.sum()
    return {**sums, "top1/hits": found, "top1/asked": asked}
