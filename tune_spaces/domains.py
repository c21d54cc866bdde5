"""Four kinds of domain for a searched config field, as plain data. Samples nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Value = bool | int | float | str


@dataclass(frozen=True)
class Choice:
    """One of a few values without an order."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Uniform:
    """A number between two bounds, drawn uniformly."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """A positive number between two bounds, drawn uniformly in its logarithm."""

    low: float
    high: float


@dataclass(frozen=True)
class Integer:
    """An integer between two bounds, both included. `log` draws it uniformly in its logarithm."""

    low: int
    high: int
    log: bool = False


Domain = Choice | Uniform | LogUniform | Integer


@dataclass(frozen=True)
class Field:
    """A searched config field.

    `touches` is the first stage that must be trained again for another value. An `optional` field
    is searched only with --include-stage1; otherwise it keeps the config's value.
    """

    domain: Domain
    touches: Literal["stage1", "stage2"] = "stage2"
    optional: bool = False


Space = dict[str, Field]
"""Maps dotted config keys to fields."""
