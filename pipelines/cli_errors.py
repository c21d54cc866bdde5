"""How commands end: one message for a user's mistake, the way to resume for a failed run."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import typer

MISTAKE, FAILURE, SOME_FAILED, INTERRUPTED = 2, 1, 3, 130  # exit codes

# What a user can have got wrong, by module: looked up only among modules already imported.
USER_ERRORS = {
    "data_prep.source_base": "DataError",
    "mantis_core.bitstream": "BitstreamError",
    "mantis_core.errors": "ModelError",
    "pipelines.cluster": "PreflightError",
    "mantis_core.image_codecs": "CodecError",
    "pipelines.local_cluster": "LocalClusterError",
    "pipelines.registry": "RegistryError",
    "pipelines.report": "ReportError",
    "pipelines.run_record": "StageBusy",
    "pipelines.settings_errors": "SettingsError",
    "pipelines.storage": "StorageError",
    "pipelines.tracking": "TrackingError",
}


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
    """Whether the error is one that the user can mend, told by one message."""
    known = [
        getattr(sys.modules[module], name)
        for module, name in USER_ERRORS.items()
        if module in sys.modules
    ]
    return isinstance(error, tuple(known))


def print_json(value: Any) -> None:
    """One object on one line of stdout, for machines."""
    typer.echo(json.dumps(value))
