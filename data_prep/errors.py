"""The error of this package that a user can correct."""

from __future__ import annotations


class DataError(ValueError):
    """A user's mistake in data or data settings.

    Its message says what came, what is allowed and what to do.
    """

    exit_code = 2
