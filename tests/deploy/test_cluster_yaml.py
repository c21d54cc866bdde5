"""cluster.yaml against Ray's schema and the rules it states; starts no cluster, calls no AWS."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.machines import locked
from tests.ray_private import DEFAULT_AMI, check_ami, prepare_config, validate_config
from tests.root import ROOT


@pytest.fixture
def cluster() -> Any:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def _images(cluster: dict[str, Any]) -> list[str]:
    docker = cluster["docker"]
    nodes = cluster["available_node_types"].values()
    return [
        *(docker[key] for key in ("image", "head_image")),
        *(image for node in nodes if (image := node.get("docker", {}).get("worker_image"))),
    ]


@pytest.fixture
def nodes(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(cluster["available_node_types"])


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_refuses_an_unknown_key_so_that_the_check_means_something(
    cluster: dict[str, Any],
) -> None:
    cluster["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(cluster))


def test_every_image_tag_has_the_ray_version_of_the_lock_file(cluster: dict[str, Any]) -> None:
    assert {re.split(r"[:-]", image)[1] for image in _images(cluster)} == {locked("ray")}


def test_no_node_gets_rays_own_machine_image_whose_driver_is_too_old(
    cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]
) -> None:
    check_ami(cluster)  # as in `ray up`: fills in Ray's default where there is none
    images = {node["node_config"]["ImageId"] for node in nodes.values()}
    assert not images & set(DEFAULT_AMI.values())


def test_ec2_looks_up_the_newest_machine_image_at_each_launch(
    nodes: dict[str, dict[str, Any]],
) -> None:
    (image,) = {node["node_config"]["ImageId"] for node in nodes.values()}
    kind, service, name = image.split(":")
    assert (kind, service) == ("resolve", "ssm")
    assert name.startswith("/aws/service/deeplearning/ami/x86_64/")
    assert name.endswith("/latest/ami-id")


def test_the_head_takes_no_work_and_is_not_on_spot(
    cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]
) -> None:
    head = nodes[cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_gpu_nodes_are_spot_and_bounded(
    cluster: dict[str, Any], nodes: dict[str, dict[str, Any]]
) -> None:
    gpu = nodes["gpu"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 <= gpu["min_workers"] < gpu["max_workers"] <= cluster["max_workers"]


def test_a_gpu_node_without_a_gpu_does_not_start(nodes: dict[str, dict[str, Any]]) -> None:
    assert "--gpus all" in nodes["gpu"]["docker"]["worker_run_options"]


def test_data_nodes_have_cpus_only_and_carry_their_label(nodes: dict[str, dict[str, Any]]) -> None:
    assert nodes["data"]["labels"] == {"ray-subcluster": "data"}
    assert set(nodes["data"]["resources"]) == {"CPU"}


def test_the_dashboard_listens_on_the_loopback_interface_only(cluster: dict[str, Any]) -> None:
    started = " ".join(cluster["head_start_ray_commands"])
    assert re.findall(r"--dashboard-host=(\S+)", started) == ["127.0.0.1"]


def test_every_node_asks_for_the_token_and_has_it(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_nodes_install_a_requirements_file_that_is_copied_to_them(cluster: dict[str, Any]) -> None:
    installed = [
        command.split(" -r ")[1] for command in cluster["setup_commands"] if " -r " in command
    ]
    assert [cluster["file_mounts"][remote] for remote in installed] == [
        "./deploy/requirements-node.txt"
    ]


def test_containers_get_shared_memory_and_idle_nodes_are_given_back(
    cluster: dict[str, Any],
) -> None:
    assert any(option.startswith("--shm-size=") for option in cluster["docker"]["run_options"])
    assert 0 < cluster["idle_timeout_minutes"] <= 30
