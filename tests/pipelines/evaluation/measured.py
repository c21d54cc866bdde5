"""The rows of one codec arm, for tests."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mantis_core.codec.mantis import Mantis
from mantis_core.tasks import Problem
from pipelines.evaluation.arms import ArmSource, Arrays
from pipelines.evaluation.coded import CODED, code, ways_of
from pipelines.settings.arms import ARM_KINDS


def rows_of(
    model: Mantis, images: Tensor, batch: Arrays, problem: Problem, kind: str = "mantis", **how: Any
) -> Arrays:
    """Returns the rows of an arm of this kind by itself; `how` are further fields of its source."""
    source = ArmSource("arm", kind, None, **how)
    coded = code(model, images, ways_of(source, model, len(images), batch, problem))
    return CODED[ARM_KINDS[kind].answers](coded, batch, problem)
