"""`mantis check` and `schema`: the program itself, without runs and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.errors import FAILURE, MISTAKE, Stopped, ending_well, print_json
from pipelines.commands.options import AsJson


@ending_well
def check(as_json: AsJson = False) -> None:
    """Test the installation in seconds.

    Runs random images through every component.

    Example: mantis check
    """
    from pipelines.coding.selfcheck import run

    result = run()
    if as_json:
        print_json(result)
    for name, value in {} if as_json else result.items():
        typer.echo(f"{name}: {value}")
    if not result.get("ok", True):
        raise Stopped("the self-test failed", FAILURE)


@ending_well
def schema(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. The default prints the schema."),
    ] = None,
) -> None:
    """Print the JSON schema of a config, for editors.

    An editor with a YAML language server then completes fields, shows their meaning and marks
    mistakes in a file that begins with `# yaml-language-server: $schema=mantis.schema.json`.

    Example: mantis schema -o mantis.schema.json
    """
    from pipelines.settings.schema import config_schema

    text = json.dumps(config_schema(), indent=2)
    if output is None:
        typer.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise Stopped(f"error: cannot write {output}: {error.strerror}", MISTAKE) from error
    typer.echo(f"# yaml-language-server: $schema={output}")


COMMANDS = (check, schema)
