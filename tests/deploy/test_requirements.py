"""deploy/requirements-node.txt: what nodes install, in step with requirements.lock."""

from __future__ import annotations

import tomllib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.machines import names
from tests.root import ROOT

NODE = ROOT / "deploy" / "requirements-node.txt"
LOCK = ROOT / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def needed(extras: set[str]) -> set[str]:
    """The packages that the base and some extras need, as far as they are installed here."""
    open_ones = [Requirement(line) for line in PROJECT["dependencies"]]
    open_ones += [Requirement(line) for extra in extras for line in EXTRAS[extra]]
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_ones:
        one = open_ones.pop()
        name = canonicalize_name(one.name)
        if name == PROJECT["name"]:
            open_ones += [Requirement(line) for each in one.extras for line in EXTRAS[each]]
            continue
        if (name, frozenset(one.extras)) in seen:
            continue
        seen.add((name, frozenset(one.extras)))
        for line in metadata.requires(name) or ():
            below, chosen = Requirement(line), one.extras | {""}
            if below.marker is None or any(below.marker.evaluate({"extra": e}) for e in chosen):
                open_ones.append(below)
    return {name for name, _ in seen}


def test_every_package_has_the_version_of_the_lock_file() -> None:
    lock, node = names(LOCK), names(NODE)
    assert node
    assert {name: version for name, version in node.items() if lock.get(name) != version} == {}


def test_it_has_all_that_a_cluster_on_aws_needs() -> None:
    assert needed({"cluster", "aws"}) - set(names(NODE)) == set()


def test_it_has_none_of_the_tools_of_development() -> None:
    tools = needed({"dev"}) - needed({"cluster", "aws"})
    assert {"hypothesis", "mypy", "pytest", "ruff"} <= tools
    assert tools & set(names(NODE)) == set()


def test_it_names_no_host_and_no_option() -> None:
    lines = NODE.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "://" in line or line.startswith("-")] == []


def test_make_lock_renews_both_files() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\nlock:")[2].partition("\n\n")[0]
    assert "-o requirements.lock" in recipe
    assert "-o deploy/requirements-node.txt" in recipe
    assert "--constraint requirements.lock" in recipe
