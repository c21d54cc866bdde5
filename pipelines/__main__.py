"""The command line: `mantis`, or `python -m pipelines`. The commands are in `commands/`."""

import signal
import sys
import warnings
from types import FrameType

import typer

from pipelines.commands import chain, init, local_cluster, models, score, streams, tune

app = typer.Typer(
    help="Train, measure, register and use MANTiS, a task-adaptive image codec.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (init, chain, score, tune, models, streams):
    for command in module.COMMANDS:
        app.command()(command)
app.add_typer(local_cluster.app, name="cluster")


def main() -> None:
    """Runs one command. SIGTERM, from `ray job stop` or a preempted machine, acts as Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    if not sys.warnoptions:  # deprecations inside libraries; -W shows them
        warnings.simplefilter("ignore", FutureWarning)
    app(prog_name="mantis")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
