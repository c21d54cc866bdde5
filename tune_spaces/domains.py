"""What a searched config field may be: four kinds of domain as plain data. Samples nothing."""

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
    """A number between two bounds."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """A positive number between two bounds, its logarithm drawn evenly."""

    low: float
    high: float


@dataclass(frozen=True)
class Integer:
    """A whole number between two bounds, both included; `log`: its logarithm drawn evenly."""

    low: int
    high: int
    log: bool = False


Domain = Choice | Uniform | LogUniform | Integer


@dataclass(frozen=True)
class Field:
    """A searched field.

    `touches` is the first stage that another value trains anew. An `optional` one keeps the
    config's value unless the search is started with --include-stage1.
    """

    domain: Domain
    touches: Literal["stage1", "stage2"] = "stage2"
    optional: bool = False


Space = dict[str, Field]
"""Dotted config key to field."""
