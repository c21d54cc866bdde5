"""--version, completion, and the schema as a file."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from pipelines.__main__ import app
from pipelines.versions import release


def mantis(*arguments: object, **environment: str) -> Any:
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(app, words, prog_name="mantis", env=environment)


def test_the_version_is_printed() -> None:
    done = mantis("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"mantis {release()}")


def test_a_shell_completes_commands() -> None:
    done = mantis(
        _MANTIS_COMPLETE="complete_bash",
        COMP_WORDS="mantis pre",
        COMP_CWORD="1",
        _TYPER_COMPLETE_ARGS="mantis pre",
    )
    assert done.stdout.split() == ["prepare", "predict"]


def test_the_schema_is_printed_or_written(tmp_path: Path) -> None:
    printed = json.loads(mantis("schema").stdout)
    file = tmp_path / "mantis.schema.json"
    done = mantis("schema", "-o", file)
    assert done.stdout == f"# yaml-language-server: $schema={file}\n"
    assert json.loads(file.read_text()) == printed
    wrong = mantis("schema", "-o", tmp_path)
    assert wrong.exit_code == 2
    assert "cannot write" in wrong.stderr
