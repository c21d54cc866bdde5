"""On a cluster: where the actors that serve a driver are put."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import io
import json
import ray
from ray.cluster_utils import Cluster
from pipelines.terminal import progress
from pipelines.terminal.console import Console

class Board(progress.ProgressBoard):
    def node(self):
        return ray.get_runtime_context().get_node_id()

progress.ProgressBoard = Board
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False})
other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
ray.init(address=cluster.address, log_to_driver=False)
nodes = []
for _ in range(5):
    with progress.watch_progress(Console(io.StringIO())):
        nodes.append(ray.get(ray.get_actor(progress.BOARD_NAME).node.remote()))
print(json.dumps({"own": ray.get_runtime_context().get_node_id(), "nodes": nodes}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_board_is_not_lost_with_another_node() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["nodes"] == [told["own"]] * 5
