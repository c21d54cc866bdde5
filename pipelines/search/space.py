"""Loads search spaces by name and converts them to config overrides and Optuna distributions."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tune_spaces
from data_prep.tasks import did_you_mean
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import with_overrides
from pipelines.settings.sections import Settings
from tune_spaces.domains import Choice, Domain, Field, Integer, LogUniform, Space, Uniform, Value

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Params = Mapping[str, Value]
"""One sample of a space: maps dotted config keys to values."""


def space_names() -> list[str]:
    """Returns the names of the spaces in tune_spaces/."""
    folder = Path(tune_spaces.__file__).parent
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in NO_SPACE)


NO_SPACE = ("__init__", "domains")


def load_space(name: str, *, include_stage1: bool) -> Space:
    """Loads the searched fields of `tune_spaces/<name>.py`.

    Raises SettingsError if there is no such space.
    """
    known = space_names()
    if name not in known:
        hint = did_you_mean(name, known) or f"; the spaces are: {', '.join(known)}"
        raise SettingsError(f"--space {name}: there is no such space{hint}")
    space: Space = importlib.import_module(f"tune_spaces.{name}").SPACE
    return {key: field for key, field in space.items() if include_stage1 or not field.optional}


def searched_space(settings: Settings, name: str, *, include_stage1: bool) -> Space:
    """Loads the fields that a search of this config varies.

    A model of several rates has no rate weight to search: its field is left out. So are choices
    that the config refuses, such as a conditioning by what a detector sees where there is none.
    Raises SettingsError if no field is left, or as `load_space`.
    """
    space = load_space(name, include_stage1=include_stage1)
    if settings.stage2.rate_weights:
        space.pop("stage2.rate_weight", None)
    if not space:
        raise SettingsError(
            f"--space {name} varies stage2.rate_weight alone, and stage2.rate_weights takes its "
            "place: set it to [], or search another space"
        )
    fitting = {key: _fitting(settings, key, field) for key, field in space.items()}
    return {key: field for key, field in fitting.items() if field is not None}


def _fitting(settings: Settings, key: str, field: Field) -> Field | None:
    """Returns a field with the choices that the config takes, None where less than two are left."""
    if not isinstance(field.domain, Choice):
        return field
    kept = []
    for value in field.domain.values:
        with suppress(SettingsError):
            with_overrides(settings, overrides_of({key: value}))
            kept.append(value)
    return replace(field, domain=Choice(tuple(kept))) if len(kept) > 1 else None


def first_stage(space: Mapping[str, Field]) -> str:
    """Returns the first stage that differs between trials: stage1 or stage2."""
    return "stage1" if any(field.touches == "stage1" for field in space.values()) else "stage2"


def overrides_of(params: Params) -> list[str]:
    """Formats a sample as command-line overrides, such as `stage2.rate_weight=0.01`."""
    return [f"{key}={json.dumps(value)}" for key, value in params.items()]


def describe(space: Mapping[str, Field]) -> dict[str, str]:
    """Maps each key to its domain as text. Part of the key that identifies a search."""
    return {key: repr(field.domain) for key, field in space.items()}


def distributions(space: Mapping[str, Field]) -> dict[str, BaseDistribution]:
    """Converts the space to Optuna distributions."""
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
