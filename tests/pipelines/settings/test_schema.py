"""The JSON schema of a config: editors show its descriptions and mark what it refuses."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from pipelines.settings.reading import _read_yaml
from pipelines.settings.schema import config_schema
from tests.root import ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMA = config_schema()


def fields(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every property in the schema with its place."""
    if isinstance(node, dict):
        for name, held in (node.get("properties") or {}).items():
            yield f"{place}/{name}", held
        for name, held in node.items():
            yield from fields(held, f"{place}/{name}")
    elif isinstance(node, list):
        for held in node:
            yield from fields(held, place)


def errors(config: Any) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(config)]


def test_every_field_has_a_description() -> None:
    def described(field: dict[str, Any]) -> bool:
        name = str(field.get("$ref", "")).rpartition("/")[2]
        return bool(field.get("description") or SCHEMA["$defs"].get(name, {}).get("description"))

    found = dict(fields(SCHEMA))
    assert "/extends" in found
    assert [place for place, field in found.items() if not described(field)] == []


def test_it_is_a_schema_with_a_title_and_a_dialect() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["title"] == "MANTiS config"
    assert SCHEMA["$schema"].startswith("https://json-schema.org/")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert errors(_read_yaml(path)) == []


def test_mistakes_are_marked() -> None:
    (unknown,) = errors({"extends": "my.yaml", "stage2": {"rate_wieght": 0.1}})
    assert "rate_wieght" in unknown
    (wrong,) = errors({"cluster": {"max_failures": "two"}})
    assert "two" in wrong
