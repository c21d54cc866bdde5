"""How commands end: one message for a user's mistake, the way to resume for a failed run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import typer

MISTAKE, FAILURE, SOME_FAILED, INTERRUPTED = 2, 1, 3, 130  # exit codes


class Stopped(Exception):
    """A command that ended early, with what to say and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def ending_well(command: Callable[..., None]) -> Callable[..., None]:
    """Turns the errors a command may raise into messages on stderr and exit codes."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Stopped as stop:
            typer.echo(str(stop), err=True)
            raise typer.Exit(stop.code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if not is_mistake(error):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(MISTAKE) from None

    return wrapped


def is_mistake(error: BaseException) -> bool:
    """Whether the user can mend the error, told by one message: its class has `exit_code` 2."""
    return getattr(error, "exit_code", FAILURE) == MISTAKE


def print_json(value: Any) -> None:
    """One object on one line of stdout, for machines."""
    typer.echo(json.dumps(value))
