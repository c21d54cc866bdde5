"""Which tasks the streams of a batch carry, and the threshold that decides it.

B images, K tasks. `device/requests.py` decides so for one image, without torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def select_mask(probabilities: Tensor, threshold: Tensor | float, max_active: int) -> Tensor:
    """Which tasks a stream carries, bool (B, K), from p (B, K).

    The tasks above `threshold`, but at most the `max_active` most probable. The most probable task
    is always among them; of equal ones the first.
    """
    best = probabilities.argsort(dim=1, descending=True, stable=True)[:, :max_active]
    allowed = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, best, True)
    mask = allowed & (probabilities > threshold)
    return mask.scatter(1, best[:, :1], True)


def primary_task(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Index (B,) of the most probable task among the active ones, p and mask being (B, K)."""
    return probabilities.masked_fill(~mask, -1.0).argmax(dim=1)


def coverage_threshold(
    probabilities: Tensor, truth: Tensor, coverage: float, *, limit: int
) -> float:
    """The highest threshold, at most 0.5, that keeps the share `coverage` of the true tasks.

    Both are (N, K). Whatever the threshold, the most probable task of an image is kept, and no task
    beyond its `limit` most probable: a lower threshold can only win true tasks between these.
    """
    order = probabilities.argsort(dim=1, descending=True).argsort(dim=1)
    sure = int((truth & (order == 0)).sum())
    needed = math.ceil(coverage * int(truth.sum())) - sure
    others = probabilities[truth & (order > 0) & (order < limit)].sort(descending=True).values
    if needed <= 0 or len(others) == 0:
        return 0.5
    lowest = float(others[min(needed, len(others)) - 1])
    return min(0.5, lowest * (1 - 1e-6))
