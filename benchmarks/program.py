"""Output, argument types and error handling that the programs in benchmarks/ share."""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def say(line: str) -> None:
    """Prints a line to stderr, because stdout is for the JSON object at the end."""
    print(line, file=sys.stderr, flush=True)


def count(text: str) -> int:
    """Parses a command-line argument that must be a whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a count: give a whole number, 1 or more")
    return int(text)


def listed(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Returns a parser for a command-line argument of several values, separated by commas.

    With spaces between them, argparse would also take the key=value overrides.
    """

    def values(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text} is not a list of {kind.__name__}: give values separated by commas"
            ) from None

    return values


def commit(results: object) -> str:
    """Returns the commit whose code measures, marked if files differ from it; `results` may."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", f":!{results}")
    return git("rev-parse", "--short=12", "HEAD") + "-dirty" * bool(changed)


def one_message(main: Callable[[], T]) -> Callable[[], T]:
    """Makes a program end with one line after a user's mistake or an interrupt.

    The exit codes are those of `mantis`: 2 for a mistake, 130 for an interrupt.
    """

    @functools.wraps(main)
    def wrapped() -> T:
        try:
            return main()
        except KeyboardInterrupt:
            from pipelines.commands.errors import INTERRUPTED

            say("interrupted. The same command keeps what is finished and does the rest.")
            sys.exit(INTERRUPTED)
        except Exception as error:
            from pipelines.training.causes import MISTAKE, first_cause, is_mistake

            cause = first_cause(error)
            if not is_mistake(cause):
                raise
            say(f"error: {cause}")
            sys.exit(MISTAKE)

    return wrapped
