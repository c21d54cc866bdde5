"""The private parts of Ray: each is there as it is used, and no other file names any."""

from __future__ import annotations

import functools
import importlib
import inspect
import mmap
import re
from pathlib import Path

import pytest
import ray

from pipelines.cluster.ray_private import PARTS, TRAIN_NOTES, VARIABLES, Part
from tests.root import ROOT

HOMES = (
    "pipelines/cluster/ray_private.py",
    "data_prep/ray_data.py",
    "tests/ray_private.py",
    "tests/pipelines/cluster/test_ray_private.py",
)
PRIVATE = re.compile(
    r"\b(ray[\w.]*\._(private|internal)|ray\.train\.v2|internal_kv|_TorchBackend)\b"
)
RAY = Path(ray.__file__).parent


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.path)
def test_ray_still_has_the_part(part: Part) -> None:
    module, _, names = part.path.partition(":")
    found = functools.reduce(getattr, names.split("."), importlib.import_module(module))
    if part.takes:
        missing = set(part.takes) - inspect.signature(found).parameters.keys()
        assert not missing, f"{part.path} takes no {sorted(missing)}: this breaks {part.breaks}"


@pytest.mark.parametrize("variable", VARIABLES)
def test_ray_still_reads_the_variable(variable: str) -> None:
    assert variable in variables_of_ray(), f"this Ray {ray.__version__} does not read {variable}"


def test_ray_still_gives_its_notes_the_name() -> None:
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    assert CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == TRAIN_NOTES


@pytest.mark.parametrize("path", ["ray._private.node:Gone", "ray._private.node:Node.gone"])
def test_a_part_that_is_gone_fails_by_its_name(path: str) -> None:
    with pytest.raises(AttributeError, match=r"(?i)gone"):
        test_ray_still_has_the_part(Part(path, "nothing"))
    with pytest.raises(AssertionError, match=r"takes no .'colour'.: this breaks everything"):
        test_ray_still_has_the_part(Part("ray._private.node:Node", "everything", ("colour",)))
    assert "RAY_GONE_WITH_THE_WIND" not in variables_of_ray()


def test_no_other_file_names_a_private_part() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for folder in (
            "pipelines",
            "data_prep",
            "mantis_core",
            "mantis_lite",
            "tune_spaces",
            "benchmarks",
            "tests",
        )
        for path in sorted((ROOT / folder).rglob("*.py"))
        if str(path.relative_to(ROOT)) not in HOMES
        for match in PRIVATE.finditer(path.read_text())
    ]
    assert found == []


@functools.cache
def variables_of_ray() -> frozenset[str]:
    """Returns those of VARIABLES that Ray's files hold.

    Its C++ programs read the option `x` from `RAY_x`, and hold the name without the prefix.
    """
    wanted = {name.encode(): name for name in VARIABLES}
    wanted |= {name.removeprefix("RAY_").encode(): name for name in VARIABLES if _is_option(name)}
    found = set()
    for path in [*RAY.rglob("*.py"), RAY / "_raylet.so"]:
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
                found |= {name for text, name in wanted.items() if data.find(text) >= 0}
    return frozenset(found)


def _is_option(name: str) -> bool:
    return name.removeprefix("RAY_").islower()
