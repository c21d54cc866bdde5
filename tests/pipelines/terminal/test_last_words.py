"""What a command says that can no longer speak for itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from pipelines.terminal.last_words import last_words
with last_words("resume with: mantis run"):
    {inside}
{after}
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("inside", "after", "said"),
    [
        (KILL, "", "resume with: mantis run\n"),
        ("os._exit(1)", "", "resume with: mantis run\n"),
        ("pass", KILL, ""),
        ("raise SystemExit(1)", "", ""),
    ],
)
def test_only_a_command_that_was_ended_from_outside_leaves_a_word(
    inside: str, after: str, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(inside=inside, after=after)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (1, -signal.SIGKILL)
    assert done.stderr == said


def test_an_interrupt_is_the_commands_own_affair() -> None:
    """Ctrl-C goes to all processes of a terminal's group."""
    program = PROGRAM.format(
        inside="signal.signal(2, signal.SIG_IGN); os.killpg(0, signal.SIGINT)", after=KILL
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True,
        check=False, env=dict(os.environ),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
