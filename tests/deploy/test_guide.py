"""docs/guide/cluster.md names what the files of deploy/ hold: images, targets, driver."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.deploy.machines import locked
from tests.root import ROOT

GUIDE = (ROOT / "docs" / "guide" / "cluster.md").read_text(encoding="utf-8")
RAYJOB = (ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8")
CLUSTER = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
# https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
LEAST_DRIVER = {"12": "525", "13": "580"}


@pytest.mark.parametrize("text", [GUIDE, RAYJOB], ids=["guide", "rayjob"])
def test_the_driver_asked_for_runs_the_locked_cuda(text: str) -> None:
    least = LEAST_DRIVER[locked("cuda-toolkit").split(".")[0]]
    assert set(re.findall(r"driver (\d{3}) or newer", text)) == {least}


def test_the_command_looks_up_the_machine_image_of_the_nodes() -> None:
    nodes: dict[str, Any] = yaml.safe_load(CLUSTER)["available_node_types"]
    images = {
        node["node_config"]["ImageId"].removeprefix("resolve:ssm:") for node in nodes.values()
    }
    asked = re.findall(r"--name (/aws/service/\S+)", GUIDE)
    assert set(asked) == images
    assert f"#   {asked[0]}\n" in CLUSTER


def test_the_roles_made_are_those_of_the_nodes() -> None:
    nodes: dict[str, Any] = yaml.safe_load(CLUSTER)["available_node_types"]
    used = {node["node_config"]["IamInstanceProfile"]["Name"] for node in nodes.values()}
    assert set(re.findall(r"create-role --role-name (\S+)", GUIDE)) == used
    assert set(re.findall(r"--instance-profile-name (\S+) --role-name", GUIDE)) == used


def test_the_service_account_made_is_that_of_the_pods() -> None:
    made = re.findall(r"iamserviceaccount .* --name (\S+)", GUIDE)
    assert set(made) == set(re.findall(r"serviceAccountName: (\S+)", RAYJOB))


def test_the_targets_built_are_those_of_the_dockerfile() -> None:
    stages = re.findall(r" AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    built = set(re.findall(r"--target (\w+)", GUIDE))
    assert built == {"cpu", "gpu"}
    assert built <= set(stages)


def test_the_mlflow_image_is_that_of_the_deployment() -> None:
    deployed = (ROOT / "deploy" / "mlflow.yaml").read_text(encoding="utf-8")
    pattern = r"ghcr\.io/mlflow/mlflow:\S+"
    assert set(re.findall(pattern, GUIDE)) == set(re.findall(pattern, deployed))
