"""deploy/aws/: the rights of the nodes of cluster.yaml; calls no AWS.

The condition keys are those of
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/supported-iam-actions-tagging.html and
https://docs.aws.amazon.com/IAM/latest/UserGuide/id_roles_use_passrole.html.
"""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from botocore.client import BaseClient

from tests.ray_private import AWSNodeProvider
from tests.root import ROOT

FOLDER = ROOT / "deploy" / "aws"
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
NODES = CLUSTER["available_node_types"]


def statements(name: str) -> list[dict[str, Any]]:
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert document["Version"] == "2012-10-17"
    assert all(each["Effect"] == "Allow" for each in document["Statement"])
    return list(document["Statement"])


def actions(name: str) -> set[str]:
    listed = [each["Action"] for each in statements(name)]
    return {a for each in listed for a in ([each] if isinstance(each, str) else each)}


class FakeEC2:
    """Answers the calls of Ray's provider with one running instance, and keeps them."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}

    def answer(self, _client: BaseClient, operation: str, arguments: Any) -> dict[str, Any]:
        self.calls[operation] = arguments
        instance = {
            "InstanceId": "i-1",
            "State": {"Name": "running"},
            "StateReason": {"Message": "running"},
            "Tags": [],
        }
        return {
            "Instances": [instance],
            "Reservations": [{"Instances": [instance]}],
            "TerminatingInstances": [],
        }


@pytest.fixture
def life_of_a_node(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The EC2 calls with which the autoscaler starts, sees, tags and ends a GPU node."""
    fake = FakeEC2()
    monkeypatch.setattr(BaseClient, "_make_api_call", lambda *given: fake.answer(*given))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    provider = AWSNodeProvider(CLUSTER["provider"], CLUSTER["cluster_name"])
    config = NODES["gpu"]["node_config"] | {"SubnetIds": ["subnet-1"]}
    provider.create_node(config, {"ray-node-type": "worker"}, 1)
    (node,) = provider.non_terminated_nodes({})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    deadline = time.monotonic() + 20
    while "CreateTags" not in fake.calls and time.monotonic() < deadline:
        time.sleep(0.05)  # a thread of the provider writes tags in batches
    provider.terminate_nodes([node])
    return fake.calls


def test_the_head_may_call_what_rays_autoscaler_calls_and_no_more(
    life_of_a_node: dict[str, dict[str, Any]],
) -> None:
    called = {f"ec2:{operation}" for operation in life_of_a_node}
    assert {each for each in actions("autoscaler") if each.startswith("ec2:")} == called


def test_a_node_starts_with_the_tag_the_policy_asks_for(
    life_of_a_node: dict[str, dict[str, Any]],
) -> None:
    (tags,) = (each["Tags"] for each in life_of_a_node["RunInstances"]["TagSpecifications"])
    given = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in tags}
    asked = [
        each["Condition"]["StringEquals"]
        for each in statements("autoscaler")
        if each["Action"] == "ec2:RunInstances" and "Condition" in each
    ]
    assert asked
    assert all(each.items() <= given.items() for each in asked)


def test_the_head_ends_nodes_of_its_own_cluster_only() -> None:
    for each in statements("autoscaler"):
        if "ec2:TerminateInstances" in each["Action"]:
            tag = {"aws:ResourceTag/ray-cluster-name": CLUSTER["cluster_name"]}
            assert each["Condition"] == {"StringEquals": tag}


def test_the_head_may_give_nodes_their_role_and_no_other() -> None:
    workers = {
        node["node_config"]["IamInstanceProfile"]["Name"]
        for name, node in NODES.items()
        if name != CLUSTER["head_node_type"]
    }
    passed = [each for each in statements("autoscaler") if each["Action"] == "iam:PassRole"]
    assert [each["Resource"] for each in passed] == [
        f"arn:aws:iam::*:role/{name}" for name in workers
    ]
    service = {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    assert [each["Condition"] for each in passed] == [service]


def test_the_head_may_resolve_the_machine_image() -> None:
    (each,) = (s for s in statements("autoscaler") if "ssm:GetParameters" in s["Action"])
    covered = each["Resource"].partition(":parameter")[2].removesuffix("*")
    images = [
        node["node_config"]["ImageId"].removeprefix("resolve:ssm:") for node in NODES.values()
    ]
    assert all(image.startswith(covered) for image in images)


def test_storage_is_one_bucket_that_the_reader_names() -> None:
    resources = {each["Resource"] for each in statements("storage")}
    assert resources == {"arn:aws:s3:::BUCKET", "arn:aws:s3:::BUCKET/*"}
    assert all(action.startswith("s3:") for action in actions("storage"))
    assert not any("*" in action for action in actions("storage") | actions("autoscaler"))


def test_only_instances_take_the_roles() -> None:
    (each,) = statements("trust")
    assert each["Principal"] == {"Service": "ec2.amazonaws.com"}
