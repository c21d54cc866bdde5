"""Names of the files and figures that a training writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CHECKPOINT = "checkpoint"
"""Folder of the model inside a stage's folder."""
HISTORY = "history"
"""Figures of all epochs: JSON text in every report, and at the end a file of the stage."""
BEST = "best.json"
"""Figures of the best epoch, written when the model folder is complete."""
COMPUTED_ON = "computed_on"
"""Entry of results and of a model's meta.json, see `hardware.computed_on`."""
ROWS = "train/rows"
"""Rows trained on in one epoch; also the prefix of the two names below."""
ROWS_LEFT_OUT = "train/rows_left_out"
"""Training rows that an epoch left out because they filled no global batch.

The next epoch leaves out others.
"""
ROWS_SHA256 = "train/rows_sha256"
"""Hash of the rows of each step of an epoch. It does not depend on the number of workers."""


def rows_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the rows of one epoch, the rows it left out, and the hash of every epoch."""
    return {
        "per_epoch": history[-1][ROWS],
        "left_out": history[-1][ROWS_LEFT_OUT],
        "sha256": [epoch[ROWS_SHA256] for epoch in history],
    }
