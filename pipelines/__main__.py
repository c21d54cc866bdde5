"""The command line: `mantis`, or `python -m pipelines`. The commands stand in cli_*.py."""

import signal
import sys
import warnings
from types import FrameType

import typer

from pipelines import cli_chain, cli_local_cluster, cli_models, cli_score, cli_tune

app = typer.Typer(
    help="MANTiS: train, measure, register and use task-adaptive image codecs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for module in (cli_chain, cli_score, cli_tune, cli_models):
    for command in module.COMMANDS:
        app.command()(command)
app.add_typer(cli_local_cluster.app, name="cluster")


def main() -> None:
    """Runs one command. SIGTERM (`ray job stop`, a preempted machine) ends it as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)
    if not sys.warnoptions:  # libraries' own deprecations; -W shows them
        warnings.simplefilter("ignore", FutureWarning)
    app(prog_name="mantis")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
