"""A search space by name, its samples as config overrides, and what Optuna calls its domains."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import tune_spaces
from data_prep.subgroups import did_you_mean
from pipelines.settings_errors import SettingsError
from tune_spaces.domains import Choice, Domain, Field, Integer, LogUniform, Space, Uniform, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Params = Mapping[str, Value]
"""One sample of a space: dotted config key to value."""


def space_names() -> list[str]:
    """The files of tune_spaces that declare a space."""
    folder = Path(tune_spaces.__file__).parent
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in NO_SPACE)


NO_SPACE = ("__init__", "domains")


def load_space(name: str, *, include_stage1: bool) -> Space:
    """The fields of `tune_spaces/<name>.py` that are searched. Raises SettingsError."""
    known = space_names()
    if name not in known:
        hint = did_you_mean(name, known) or f"; known are: {', '.join(known)}"
        raise SettingsError(f"--space {name}: there is no such space{hint}")
    space: Space = importlib.import_module(f"tune_spaces.{name}").SPACE
    return {key: field for key, field in space.items() if include_stage1 or not field.optional}


def first_stage(space: Mapping[str, Field]) -> str:
    """The first stage that trials of this space do not share: stage1 or stage2."""
    return "stage1" if any(field.touches == "stage1" for field in space.values()) else "stage2"


def overrides_of(params: Params) -> list[str]:
    """A sample in the language of the command line: `stage2.rate_weight=0.01`."""
    return [f"{key}={json.dumps(value)}" for key, value in params.items()]


def describe(space: Mapping[str, Field]) -> dict[str, str]:
    """Key to domain as text: identifies what a space was when a search began."""
    return {key: repr(field.domain) for key, field in space.items()}


def distributions(space: Mapping[str, Field]) -> dict[str, BaseDistribution]:
    """The space as Optuna takes it."""
    return {key: _distribution(field.domain) for key, field in space.items()}


def _distribution(domain: Domain) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    match domain:
        case Choice(values):
            return CategoricalDistribution(values)
        case Uniform(low, high):
            return FloatDistribution(low, high)
        case LogUniform(low, high):
            return FloatDistribution(low, high, log=True)
        case Integer(low, high, log):
            return IntDistribution(low, high, log=log)
