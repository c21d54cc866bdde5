"""The documents' names: config fields, files and links lead somewhere."""

from __future__ import annotations

import re

import pytest

from docs import reference
from tests.docs.pages import BLOCK, NAMES, inline_code
from tests.root import ROOT

LINKING = [*NAMES, "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
PACKAGES = (
    "mantis_core",
    "mantis_lite",
    "data_prep",
    "pipelines",
    "tune_spaces",
    "benchmarks",
    "tests",
)
GENERATED = [ROOT / "docs" / path for path in ("log.md", *reference.pages())]
SECTION = "data|tasks|teacher|model|stage1|stage2|evaluate|tune|cluster|tracking|storage"
KEY = re.compile(rf"({SECTION})(\.\w+)+(?=$|[=:])")
PATH = re.compile(
    r"(mantis_core|mantis_lite|data_prep|pipelines|tune_spaces|benchmarks|tests|configs|deploy|results)"
    r"/[\w./-]*"
)


@pytest.mark.parametrize("page", NAMES)
def test_every_config_field_in_the_text_exists(page: str) -> None:
    shown = set(reference.config_keys())
    parts = [re.sub(r"\[\]|\.<name>", "", key).split(".") for key in shown]
    known = {".".join(each[:depth]) for each in parts for depth in range(1, len(each) + 1)}
    for span in inline_code(page):
        found = KEY.match(span)
        if found and not span.endswith((".py", ".yaml", ".json", ".md")):
            assert found.group() in known, span


@pytest.mark.parametrize("page", [*LINKING, "docs/decisions.md"])
def test_every_file_in_the_text_exists(page: str) -> None:
    for span in inline_code(page):
        if PATH.fullmatch(span):
            assert (ROOT / span).exists(), span
        elif re.fullmatch(r"\w+\.py", span):  # in a folder that the text has named
            assert any(found for each in PACKAGES for found in (ROOT / each).rglob(span)), span


@pytest.mark.parametrize("page", LINKING)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    text = BLOCK.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            path = (ROOT / page).parent.joinpath(target.partition("#")[0]).resolve()
            assert path.exists() or path in GENERATED, target
