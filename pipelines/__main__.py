"""The command line: `mantis`, or `python -m pipelines`. The commands are in `commands/`."""

import io
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated

import typer

from pipelines.cluster.machine import ensure_home
from pipelines.commands import (
    chain,
    init,
    local_cluster,
    models,
    program,
    score,
    serving,
    shelf,
    streams,
    tune,
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for module in (init, chain, score, tune, models, streams, serving, shelf, program):
    for command in module.COMMANDS:
        app.command()(command)
app.add_typer(local_cluster.app, name="cluster")


def _print_version(wanted: bool) -> None:
    from pipelines.versions import commit, release

    if wanted:
        made_from = f" (commit {commit()[:12]})" if commit() else ""
        typer.echo(f"mantis {release()}{made_from}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Train, measure, register and use MANTiS, a task-adaptive image codec."""


def main() -> None:
    """Runs one command. SIGTERM, from `ray job stop` or a preempted machine, acts as Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    ensure_home()
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that are not UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:  # deprecations inside libraries; -W shows them
        warnings.simplefilter("ignore", FutureWarning)
    app(prog_name="mantis")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
