"""The options and the result of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.search.sampler import SearchKind


@dataclass(frozen=True)
class FrontPoint:
    """A trial on the front, with its estimates on the holdout rows.

    `model` is the registered model, if any, `level` the rate level of a model of several rates.
    """

    trial: int
    wire_bytes: float
    top1: float
    params: dict[str, Any]
    run_id: str | None
    model: str | None = None
    level: int | None = None


@dataclass(frozen=True)
class SearchResult:
    """The object that `mantis tune --json` prints.

    `trials` counts trials by state. `failed` maps trial number to reason. `overhead` is the share
    of the wall time without a running or starting trial; None if this session ran no trial.
    """

    run_id: str | None
    root: str
    folder: str
    trials: dict[str, int]
    front: tuple[FrontPoint, ...]
    hypervolume: float
    stage1_configs: int
    epochs: int
    failed: dict[int, str]
    concurrent: int | None
    seconds: float
    overhead: float | None


@dataclass(frozen=True)
class SearchOptions:
    """The options of `mantis tune` that define a search."""

    space: str
    trials: int
    kind: SearchKind = "optuna"
    objective: str = "pareto"
    include_stage1: bool = False
    resume: bool = False
    register: bool = False
    seed: int = 0
