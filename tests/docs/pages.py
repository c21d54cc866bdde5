"""What the tests of the documents read: pages, their blocks, their code spans. Holds no test."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.root import ROOT

WRITTEN_ELSEWHERE = {"decisions.md"}
PAGES = [
    ROOT / "README.md",
    *sorted(
        path
        for path in (ROOT / "docs").rglob("*.md")
        if path.name not in WRITTEN_ELSEWHERE and "reference" not in path.parts
    ),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(
    r"(?:^<!-- docs: (?P<mark>.*?) -->\n)?^```(?P<info>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


class Block(NamedTuple):
    """A fenced block: its text, the mark before it and its line."""

    text: str
    mark: str
    line: int


def blocks(page: str, info: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(found["text"], found["mark"] or "", text[: found.start()].count("\n"))
        for found in BLOCK.finditer(text)
        if found["info"] == info
    ]


def pages_with(info: str) -> list[str]:
    return [name for name in NAMES if blocks(name, info)]


def inline_code(page: str) -> list[str]:
    """Code spans of the running text, blocks left out."""
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def write_configs(page: str, folder: Path) -> Iterator[Path]:
    """Each YAML block of a page as a config file, named as its first comment says."""
    for block in blocks(page, "yaml"):
        named = re.match(r"# (\w+\.yaml)\b", block.text)
        raw = yaml.safe_load(block.text)
        whole = "extends" in raw or {"data", "tasks"} <= set(raw)
        base = re.sub(r"^base=", "", block.mark) or "quickstart"
        (folder / f"{base}.yaml").write_bytes((ROOT / f"configs/{base}.yaml").read_bytes())
        path = folder / (named.group(1) if named else f"line_{block.line}.yaml")
        path.write_text(block.text if whole else f"extends: {base}.yaml\n{block.text}", "utf-8")
        yield path
