"""The command line that repeats a command, as the user can paste it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The environment variable, of this name, in which Ray tells a submitted job who it is."""


def command_line(words: Sequence[str]) -> str:
    """Returns the line that runs this program with `words` from the current folder."""
    return shlex.join([*_program(sys.argv[0], sys.executable), *words])


def resuming(line: str) -> str:
    """Returns what to do to resume: paste the line, or submit the job again if this is one.

    The shell of a user cannot run the line of a job, whose files are on the cluster.
    """
    try:
        job = json.loads(os.environ.get(JOB_CONFIG, ""))["metadata"]["job_submission_id"]
    except (ValueError, KeyError, TypeError):
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
