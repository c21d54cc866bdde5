"""How commands end: one message for a user's mistake, the resuming command for a failed run."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from pipelines.commands.messages import FAILURE as FAILURE
from pipelines.commands.messages import Told, is_fault, job_id, of_fault, resuming, told
from pipelines.training.causes import MISTAKE as MISTAKE
from pipelines.training.causes import is_mistake

if TYPE_CHECKING:
    from mantis_core.device.files import Failure, Found
    from pipelines.coding.answers import Table
    from pipelines.settings.sections import Settings
    from pipelines.terminal.counting import Counter

logger = logging.getLogger(__name__)

TRACEBACK_LINES = 40  # of an error in a Ray job
SOME_FAILED, INTERRUPTED = 3, 130  # exit codes, beside FAILURE and MISTAKE


class Stopped(Exception):
    """Ends a command with an exit code, and a message unless it is empty."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def ending_well(command: Callable[..., None]) -> Callable[..., None]:
    """Decorates a command: its errors become messages on stderr and exit codes."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Stopped as stop:
            if str(stop):
                typer.echo(str(stop), err=True)
            raise typer.Exit(stop.code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort, BrokenPipeError):  # typer ends these itself
            raise
        except Exception as error:
            plain = bool(kwargs.get("plain"))
            known = told(error, command.__name__, plain=plain) or Told(of_fault(error), FAILURE)
            typer.echo(f"error: {known.text}", err=True)
            raise typer.Exit(known.code) from None

    return wrapped


def print_json(value: Any) -> None:
    """Prints one JSON object on one line of stdout, for other programs to read.

    Raises ValueError for NaN and infinities, which are not JSON.
    """
    typer.echo(json.dumps(value, allow_nan=False))


class Tally:
    """Counts what a command on many files has done, and tells each failure.

    It decides the exit code: 3 if some files failed, 2 if all did.
    """

    def __init__(self, found: Found, counter: Counter, table: Table | None = None) -> None:
        self._counter, self._table = counter, table
        self._asked = len(found.sources) + len(found.failures)
        self.done = 0
        self.failures: list[Failure] = []
        if left_out := found.left_out():
            counter.warn(left_out)
        for failure in found.failures:
            self.fail(failure)

    def fail(self, failure: Failure) -> None:
        """Tells a failure on stderr, and in the table if there is one."""
        self.failures.append(failure)
        self._counter.warn(f"error: {failure.reason}")
        if self._table is not None:
            self._table.add_failure(failure)

    def listed(self) -> list[dict[str, str]]:
        """Returns the failures as JSON values."""
        return [failure.to_dict() for failure in self.failures]

    def summary(self, what: str) -> str:
        """Returns how many were done and failed."""
        from mantis_core.device.files import summary

        return summary({what: self.done, "failed": len(self.failures)})

    def end(self) -> None:
        """Raises Stopped if some files failed, with 3, or if all did, with 2."""
        if self.failures:
            told = f"error: {len(self.failures)} of {self._asked} files failed"
            code = SOME_FAILED if self.done else MISTAKE
            raise Stopped(told if self._asked > 1 else "", code)


@contextmanager
def terminal(settings: Settings, as_json: bool, resume: str) -> Iterator[TextIO]:
    """Yields the stream for the user's output of a run on Ray. All other output goes to a log.

    The log lies below the storage root; for a remote root it is copied there while the command
    runs. Handles errors as `resumable` does. Inside a Ray job it prints the end of a traceback too,
    because the job's log is all that its user can read.
    """
    from pipelines.cluster.preflight import check_room
    from pipelines.storage import Store
    from pipelines.terminal.kept_log import FOLDER, copied, log_name
    from pipelines.terminal.last_words import last_words
    from pipelines.terminal.logs import captured_output

    check_room(settings.storage.root)
    store, name = Store(settings.storage.root), log_name()
    root = store.local_path()
    log = Path("runs/logs") if root is None else root / FOLDER
    place = str(log) if root is not None else store.join(FOLDER, name)
    killed = f"the command or its Ray was killed. Details are in {place}. {resuming(resume)}"
    with (
        resumable(resume) as details,
        last_words(killed),
        captured_output(log) as (stdout, stderr, file),
        copied(file, store, name) if root is None else contextlib.nullcontext(),
    ):
        details.append(str(file) if root is not None else place)
        try:
            yield stderr if as_json else stdout
        except Exception as error:
            logger.exception("the command failed")
            if job_id() is not None and not is_mistake(getattr(error, "cause", error)):
                stderr.write(end_of_traceback(error))
            raise


def end_of_traceback(error: BaseException) -> str:
    """Returns the last lines of an error's traceback."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    cut = [f"... {len(lines) - TRACEBACK_LINES} lines above"]
    shown = lines if len(lines) <= TRACEBACK_LINES else cut + lines[-TRACEBACK_LINES:]
    return "\n".join(shown) + "\n"


@contextmanager
def resumable(resume: str) -> Iterator[list[str]]:
    """Turns the failure of a run into Stopped, with one message and the resuming command.

    A mistake has no such command, because the same one would fail again. Yields a list. The caller
    may append the path of a log, which the message then names.
    """
    from pipelines.stages.spec import StageFailed

    details: list[str] = []
    again = resuming(resume)
    try:
        yield details
    except KeyboardInterrupt:
        raise Stopped(f"interrupted. {again}", INTERRUPTED) from None
    except Exception as error:
        cause = error.cause if isinstance(error, StageFailed) else error
        if is_mistake(cause):
            where = f"{error.stage}: " if isinstance(error, StageFailed) else ""
            raise Stopped(f"error: {where}{cause}", MISTAKE) from None
        where = f"{error.stage} failed: " if isinstance(error, StageFailed) else ""
        log = details[0] if details else None
        known = told(cause)
        if known is not None:
            shown = f"{where}{known.text}"
        elif is_fault(cause) or log is None:
            shown = f"{where}{of_fault(cause, log)}"
            log = None
        else:
            shown = str(error) if where else f"{type(error).__name__}: {error}"
        shown = shown.partition("\nTraceback (most recent call last)")[0]  # Ray's; the log has it
        details_in = f"Details are in {log}. " if log else ""
        raise Stopped(f"{shown}\n{details_in}{again}", FAILURE) from None
