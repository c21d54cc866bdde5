"""What the programs here share: lines for people, counts from the command line, mistakes."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def say(line: str) -> None:
    """A line for people, at once: standard output is left to the JSON object at the end."""
    print(line, file=sys.stderr, flush=True)


def count(text: str) -> int:
    """An argument that is a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count: give a whole number, 1 or more")
    return int(text)


def listed(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """An argument of several values with commas between them; spaces would swallow key=value."""

    def values(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text} is no list of {kind.__name__}: give values with commas between them"
            ) from None

    return values


def one_message(main: Callable[[], T]) -> Callable[[], T]:
    """Ends the program with one line where the user made the mistake, or interrupted it.

    Exit codes as `mantis`'s: 2 and 130.
    """

    @functools.wraps(main)
    def wrapped() -> T:
        try:
            return main()
        except KeyboardInterrupt:
            from pipelines.cli_errors import INTERRUPTED

            say("interrupted: the same command again takes what is finished as it is")
            sys.exit(INTERRUPTED)
        except Exception as error:
            from pipelines.cli_errors import MISTAKE, is_mistake

            if not is_mistake(error):
                raise
            say(f"error: {error}")
            sys.exit(MISTAKE)

    return wrapped
