"""The documents' commands: they are parsed, never run. Programs, options and targets exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from docs import reference
from mantis_lite.__main__ import command_line
from pipelines.__main__ import app
from pipelines.settings.reading import load_settings
from tests.docs.pages import NAMES, blocks, inline_code, pages_with, write_configs
from tests.root import ROOT

TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
OTHER_PROGRAMS = {
    *{".", "aws", "curl", "docker", "eksctl", "export", "git", "kubectl", "mlflow", "pip"},
    *{"ray", "sed", "uv"},
}


def command_lines(page: str) -> Iterator[list[str]]:
    """The words of each line of the page's bash blocks, comments and continuations resolved."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:3] == ["ray", "job", "submit"]:
                words = words[words.index("--") + 1 :]
            if words:
                yield words


def parse(words: list[str]) -> dict[str, Any]:
    """The parameters of a `mantis` line; raises what the command line would."""
    command: Any = get_command(app)
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return dict(command.make_context("mantis", words).params)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_every_command_line_of_a_page_parses(page: str, tmp_path: Path) -> None:
    list(write_configs("README.md", tmp_path))
    for words in command_lines(page):
        if words[0] == "mantis" or words[:3] == ["python", "-m", "pipelines"]:
            found = parse(words[1:] if words[0] == "mantis" else words[3:])
            check_overrides(found, tmp_path)
        elif words[0] == "mantis-lite":
            command_line().parse_args(words[1:])
        elif words[:2] == ["python", "-m"]:
            check_program(words[2:])
        elif words[0] == "make":
            assert words[1] in TARGETS, words
        else:
            assert words[0] in OTHER_PROGRAMS, words


def check_overrides(found: dict[str, Any], folder: Path) -> None:
    """The overrides of a line fit the config it names."""
    if found.get("config") is None:
        return
    named = Path(found["config"])
    path = ROOT / named if named.parts[0] == "configs" else folder / named
    overrides = [word for word in found.get("overrides") or () if "=" in word]
    assert load_settings(path, overrides).tasks


def check_program(words: list[str]) -> None:
    """The program is there and its source names each option."""
    place = ROOT / words[0].replace(".", "/")
    sources = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{words[0]} has no {word}"


@pytest.mark.parametrize("page", NAMES)
def test_every_command_in_the_text_exists(page: str) -> None:
    known = {" ".join(words): command for words, command in reference.commands()}
    for span in inline_code(page):
        words = span.split()
        if words[0] == "mantis" and len(words) > 1:
            name = " ".join(words[:3]) if " ".join(words[:3]) in known else " ".join(words[:2])
            assert name in known, span
            options = {opt for each in known[name].params for opt in each.opts} | {"--help"}
            used = {word.strip("[]") for word in words if word.strip("[").startswith("--")}
            assert used <= options, span
        elif words[:2] == ["python", "-m"] and words[2] != "pipelines":
            check_program(words[2:])
        elif words[0] == "make" and len(words) > 1:
            assert words[1] in TARGETS, words
