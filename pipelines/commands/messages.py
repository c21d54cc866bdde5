"""What an error says to a user: one message with a remedy, an exit code, how to resume.

Prints nothing.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.training.causes import BUGS, MISTAKE, first_cause

FAILURE = 1
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable, of this name, in which Ray tells a submitted job who it is."""
SHOW_TRACEBACKS = "MANTIS_TRACEBACK"
"""The environment variable that shows tracebacks on the terminal."""
OURS = ("pipelines", "mantis_core", "mantis_lite", "data_prep", "tune_spaces", "benchmarks")
NEEDED_BY_RUNS = ("ray", "mlflow", "optuna", "pandas")
EXTRAS = {
    "encode": "client",
    "info": "client",
    "decode": "server",
    "predict": "server",
    "check": "plain",
    "export": "export",
    "serve": "serve",
    "camera": "serve",
    "label": "plain",
    "up": "cluster",
    "status": "cluster",
    "down": "cluster",
}
"""The extra of the package that a command needs, where it is not `train`."""

_SPACE = (
    "free some space there, or use another disk: storage.root is the place of results, TMPDIR that "
    "of temporary files"
)
_RIGHTS = "check its permissions, or name another place"
_PATH = "check the path"
_FILES = "raise the limit of open files, as with `ulimit -n 4096`, and run again"
REMEDIES = {
    errno.ENOSPC: (_SPACE, FAILURE),
    errno.EDQUOT: (_SPACE, FAILURE),
    errno.EMFILE: (_FILES, FAILURE),
    errno.ENFILE: (_FILES, FAILURE),
    errno.EIO: ("the disk or the network drive is at fault: check it, then run again", FAILURE),
    errno.EROFS: (_RIGHTS, MISTAKE),
    errno.EACCES: (_RIGHTS, MISTAKE),
    errno.EPERM: (_RIGHTS, MISTAKE),
    errno.ENOENT: (_PATH, MISTAKE),
    errno.ENOTDIR: (_PATH, MISTAKE),
    errno.EISDIR: ("it is a folder, and a file is needed", MISTAKE),
    errno.ENAMETOOLONG: ("give a shorter name", MISTAKE),
}
"""What to do about an OSError, and the exit code, by its number."""


@dataclass(frozen=True)
class Told:
    """The message of an error and the exit code of the command that met it."""

    text: str
    code: int


def told(error: BaseException, command: str = "", *, plain: bool = False) -> Told | None:
    """Returns what a user is told about an error; None if nobody has foreseen it.

    `command` is the name of the command and `plain` whether it runs without Ray: both decide which
    packages it needs.
    """
    error = first_cause(error)
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return Told(str(error), code)
    if isinstance(error, ModuleNotFoundError):
        return _of_missing_package(error, command, plain)
    if isinstance(error, MemoryError):
        what = str(error) or "out of memory"
        return Told(f"{what}: use smaller batches or fewer workers, then run again", FAILURE)
    if isinstance(error, OSError):
        remedy, code = REMEDIES.get(error.errno or 0, ("", FAILURE))
        if error.filename is None and error.errno in (errno.ENOENT, errno.EACCES):
            remedy = ""  # a library's, whose text names the place
        what = error.strerror or str(error) or type(error).__name__
        where = f"{printable(error.filename)}: " if error.filename is not None else ""
        return Told(f"{where}{what}{f'; {remedy}' if remedy else ''}", code)
    return None


def printable(name: object) -> str:
    """Returns a file's name with `\\xNN` for the bytes that are not UTF-8."""
    if isinstance(name, str | bytes | os.PathLike):
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return str(name)


def of_fault(error: BaseException, log: str | None = None) -> str:
    """Returns the message of an error that nobody has foreseen, with the place of its traceback.

    That is `log`, or a new file for temporary files. With MANTIS_TRACEBACK set the traceback goes
    to stderr as well.
    """
    shown = bool(os.environ.get(SHOW_TRACEBACKS))
    if shown:
        traceback.print_exception(error)
    place = log or _kept_traceback(error)
    where = f"Its traceback is in {place}" if place else f"{SHOW_TRACEBACKS}=1 shows its traceback"
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    return f"{what}\nThis is a fault of MANTiS or of a library that it uses. {where}."


def is_fault(error: BaseException) -> bool:
    """Returns whether an error is one of wrong code."""
    return isinstance(error, BUGS) and told(error) is None


def _of_missing_package(error: ModuleNotFoundError, command: str, plain: bool) -> Told | None:
    package = (error.name or "").partition(".")[0]
    if not package or package in OURS:
        return None
    extra = "plain" if plain else EXTRAS.get(command, "train")
    if package in NEEDED_BY_RUNS and extra not in ("train", "cluster"):
        extra = "train"
    what = f"`mantis {command}`" if command else "this command"
    return Told(
        f"{what} needs the package {package}, which is not installed: "
        f"pip install 'mantis-codec[{extra}]'",
        MISTAKE,
    )


def _kept_traceback(error: BaseException) -> str | None:
    """Writes the traceback to a new file that no other user can read; None if that fails."""
    try:
        number, path = tempfile.mkstemp(prefix="mantis-traceback-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return None
    return path


def command_line(words: Sequence[str]) -> str:
    """Returns the line that runs this program with `words` from the current folder."""
    return shlex.join([*_program(sys.argv[0], sys.executable), *words])


def job_id() -> str | None:
    """Returns the submission id of the Ray job that this process drives; None outside of a job."""
    try:
        return str(json.loads(os.environ.get(JOB_CONFIG, ""))["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return None


def resuming(line: str) -> str:
    """Returns what to do to resume: paste the line, or submit the job again if this is one.

    The shell of a user cannot run the line of a job, whose files are on the cluster.
    """
    job = job_id()
    if job is None:
        return f"Resume with:\n  {line}"
    return f"To resume, submit the job {job} again with another --submission-id. It ran:\n  {line}"


def _program(script: str, python: str) -> list[str]:
    """Returns the words that start this program, `mantis` alone if the shell finds it."""
    path = Path(script)
    if path.name == "__main__.py" and path.parent.name == "pipelines":
        return [_shortest(python, ("python", "python3")), "-m", "pipelines"]
    if path.name != "mantis":  # a test, or another program that calls the commands
        return ["mantis"]
    return [_shortest(script, ("mantis",))]


def _shortest(program: str, names: Sequence[str]) -> str:
    """Returns the name by which the shell finds the program, else its path, relative if below."""
    here = os.path.abspath(program)
    for name in names:
        found = shutil.which(name)
        if found and os.path.abspath(found) == here:
            return name
    below = os.path.relpath(here)
    return here if below.startswith("..") else below
