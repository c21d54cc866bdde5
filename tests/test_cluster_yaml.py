"""cluster.yaml against Ray's schema and the rules it states; starts no cluster, calls no AWS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.ray_private import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> Any:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def _images(cluster: dict[str, Any]) -> list[str]:
    docker = cluster["docker"]
    nodes = cluster["available_node_types"].values()
    return [
        *(docker[key] for key in ("image", "head_image")),
        *(node["docker"]["worker_image"] for node in nodes if "docker" in node),
    ]


def test_ray_accepts_the_file(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_ray_refuses_an_unknown_key_so_that_the_check_means_something(
    cluster: dict[str, Any],
) -> None:
    cluster["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(cluster))


def test_every_image_tag_has_the_ray_version_of_the_lock_file(cluster: dict[str, Any]) -> None:
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked is not None
    versions = {re.split(r"[:-]", image)[1] for image in _images(cluster)}
    assert versions == {locked[1]}


def test_the_head_takes_no_work_and_is_not_on_spot(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_gpu_nodes_are_spot_and_bounded(cluster: dict[str, Any]) -> None:
    gpu = cluster["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert 0 <= gpu["min_workers"] < gpu["max_workers"] <= cluster["max_workers"]


def test_data_nodes_have_cpus_only_and_carry_their_label(cluster: dict[str, Any]) -> None:
    data = cluster["available_node_types"]["data"]
    assert data["labels"] == {"ray-subcluster": "data"}
    assert set(data["resources"]) == {"CPU"}


def test_the_dashboard_listens_on_the_loopback_interface_only(cluster: dict[str, Any]) -> None:
    started = " ".join(cluster["head_start_ray_commands"])
    assert re.findall(r"--dashboard-host=(\S+)", started) == ["127.0.0.1"]


def test_every_node_asks_for_the_token_and_has_it(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]
    assert "RAY_AUTH_TOKEN=" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8")


def test_nodes_install_what_the_lock_file_pins(cluster: dict[str, Any]) -> None:
    remote = next(
        target for target, local in cluster["file_mounts"].items() if local.endswith(".lock")
    )
    assert any(command.endswith(f"-r {remote}") for command in cluster["setup_commands"])


def test_containers_get_shared_memory_and_idle_nodes_are_given_back(
    cluster: dict[str, Any],
) -> None:
    assert any(option.startswith("--shm-size=") for option in cluster["docker"]["run_options"])
    assert 0 < cluster["idle_timeout_minutes"] <= 30
