"""Right answers of a batch."""

from __future__ import annotations

from torch import nn

from mantis_core.tasks import Batch, Problem
from mantis_core.training.hits import label_hits


def test_hits_count_right_answers_and_questions(problem: Problem, batch: Batch) -> None:
    truth = {
        f"logits/{t.name}": nn.functional.one_hot(batch.labels[:, k].clamp_min(0), 3).float()
        for k, t in enumerate(problem.tasks)
    }
    sums = label_hits(truth, problem.tasks, batch)
    assert int(sums["top1/hits"]) == int(sums["top1/asked"]) == int(batch.task_mask.sum())
    flat = nn.functional.one_hot((batch.class_label + 1) % 6, 6).float()
    assert int(label_hits({"logits": flat}, problem.tasks, batch)["top1/hits"]) == 0
