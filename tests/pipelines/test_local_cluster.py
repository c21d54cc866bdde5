"""A cluster of several nodes on one machine: what it starts, where it listens, what it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import psutil
import pytest

from pipelines.local_cluster import (
    LocalCluster,
    LocalClusterError,
    local_cluster,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(workers=2, cpus=1) as started:
        yield started


def family(cluster: LocalCluster) -> list[psutil.Process]:
    """Every process of a cluster."""
    roots = [process for each in cluster.started if (process := each.process())]
    return [each for root in roots for each in (root, *root.children(recursive=True))]


RESOURCES = """
import os, ray
ray.init(address=os.environ["ADDRESS"], log_to_driver=False)
print(int(ray.cluster_resources()["CPU"]), sum(node["Alive"] for node in ray.nodes()))
"""


@pytest.mark.faults
class TestARunningCluster:
    def test_has_a_head_without_cpus_and_the_nodes_asked_for(self, cluster: LocalCluster) -> None:
        environment = {**os.environ, **cluster.environment, "ADDRESS": cluster.address}
        command = [sys.executable, "-c", RESOURCES]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.stdout.split() == ["2", "3"], done.stderr

    def test_listens_on_the_loopback_interface_only(self, cluster: LocalCluster) -> None:
        hosts = {
            connection.laddr.ip
            for process in family(cluster)
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert hosts == {"127.0.0.1", "::ffff:127.0.0.1"}

    def test_refuses_who_has_no_token(self, cluster: LocalCluster) -> None:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{cluster.job_address}/api/jobs/", timeout=10)
        assert isinstance(cluster.request("/api/jobs/"), list)

    def test_is_not_started_twice(self, cluster: LocalCluster) -> None:
        before = cluster.started
        with pytest.raises(LocalClusterError, match="runs already"):
            LocalCluster(cluster.folder).start()
        assert cluster.started == before


@pytest.mark.faults
def test_stopping_ends_all_of_it_and_nothing_else() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        with local_cluster(workers=1, cpus=1) as cluster:
            processes = family(cluster)
        assert len(processes) > 5
        assert [each for each in processes if each.is_running()] == []
        assert not cluster.folder.exists()
        assert bystander.poll() is None
        bystander.communicate(b"\n")
