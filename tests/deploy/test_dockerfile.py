"""The Dockerfile and .dockerignore, read as text: versions, files, users; builds nothing."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import PurePosixPath

import pytest

from tests.deploy.machines import locked, names
from tests.root import ROOT

NODE = "deploy/requirements-node.txt"


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, continued lines joined: name -> (instruction, rest)."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    stage = ""
    for line in filter(str.strip, text.splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            found[stage] = []
        found[stage].append((word, " ".join(rest.split())))
    return found


def copied() -> list[str]:
    """What is copied from the checkout, in all stages."""
    sources: list[str] = []
    for instructions in stages().values():
        for word, rest in instructions:
            if word == "COPY" and "--from=" not in rest:
                *given, _ = [each for each in rest.split() if not each.startswith("--")]
                sources += given
    return sources


def ignored(path: str) -> bool:
    """Docker's rule: the last pattern that matches the path or a folder above it decides."""
    verdict = False
    for raw in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = raw.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keeps, pattern = pattern.startswith("!"), pattern.lstrip("!").removeprefix("**/")
        parts = PurePosixPath(path).parts
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        candidates = [*above, *(parts if raw.lstrip("!").startswith("**/") else ())]
        if any(fnmatch(each, pattern) for each in candidates):
            verdict = not keeps
    return verdict


def test_every_image_is_rays_of_the_locked_version() -> None:
    images = [
        rest.split(" AS ")[0] for each in stages().values() for word, rest in each if word == "FROM"
    ]
    assert {re.split(r"[:-]", image)[:2][0] for image in images} == {"rayproject/ray"}
    assert {image.partition(":")[2].partition("-")[0] for image in images} == {locked("ray")}


@pytest.mark.parametrize("path", sorted(set(copied())))
def test_what_is_copied_exists_and_reaches_docker(path: str) -> None:
    assert (ROOT / path).exists()
    assert not ignored(path)


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "runs/mlflow.db", "auth_token", "deploy/rayjob.yaml"],
)
def test_what_is_not_copied_stays_out_of_the_context(path: str) -> None:
    assert ignored(path)


def test_leftovers_of_python_stay_out_of_the_image() -> None:
    assert ignored("pipelines/__pycache__/x.pyc")
    assert not ignored("pipelines/__main__.py")


def test_the_wheel_is_built_from_every_package_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^include = \[(.*)\]$", text, re.MULTILINE)
    packages = {name.strip(' "*') for name in listed.split(",")}
    assert packages <= set(copied())


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_installs_the_packages_of_a_node_and_mantis(target: str) -> None:
    run = " ".join(rest for word, rest in stages()[target] if word == "RUN")
    assert "requirements-node.txt" in run
    assert ".whl" in run
    assert "requirements.lock" not in run


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_container_does_not_run_as_root(target: str) -> None:
    users = [rest for word, rest in stages()[target] if word == "USER"]
    assert users[-1:] == ["1000"]  # Ray's user: docker/base-deps/Dockerfile of ray-project/ray


def test_the_cpu_target_leaves_out_cuda_and_nothing_else() -> None:
    run = " ".join(rest for word, rest in stages()["cpu"] if word == "RUN")
    (pattern,) = re.findall(r"grep -vE '([^']+)'", run)
    kept = subprocess.run(
        ["grep", "-vE", pattern, NODE], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    left = set(names(ROOT / NODE)) - set(re.findall(r"^([\w.-]+)==", kept, re.MULTILINE))
    assert "torch==" in kept
    assert {name.split("-")[0] for name in left} == {"nvidia", "cuda", "triton"}
    assert "--torch-backend cpu" in run


def test_the_gpu_target_is_given_the_gpus() -> None:
    environment = " ".join(rest for word, rest in stages()["gpu"] if word == "ENV")
    assert "NVIDIA_VISIBLE_DEVICES=all" in environment
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in environment
