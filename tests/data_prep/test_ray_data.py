"""Where Ray Data's tasks run on a cluster with nodes of their own, and when those are lost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster
from data_prep.ray_data import map_tables, reading_cpus

STORE = 100 * 2**20

def place(table):
    return {"row": table["row"].to_numpy(), "node": [ray.get_runtime_context().get_node_id()]}

@ray.remote(num_cpus=1)
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()

cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False})
data = cluster.add_node(num_cpus=2, labels={"ray-subcluster": "data"}, object_store_memory=STORE)
ray.init(address=cluster.address, log_to_driver=False)
tables = [pa.table({"row": [row]}) for row in range(12)]
told = {"cpus": reading_cpus()}
head = next(n["NodeID"] for n in ray.nodes() if "ray-subcluster" not in n["Labels"])
worker = Worker.options(label_selector={"ray.io/node-id": head}).remote()
assert ray.get(worker.node.remote()) == head
for name in ("confined", "lost"):
    if name == "lost":
        ray.kill(worker)
    rows, nodes = [], set()
    dataset = map_tables(tables, place, num_cpus=0.5, max_tasks=1, confined=name == "confined")
    for batch in dataset.iter_batches(batch_size=None):
        rows += batch["row"].tolist()
        nodes |= {"head" if node == head else "data" for node in batch["node"]}
        if name == "lost" and len(rows) == 3:
            cluster.remove_node(data, allow_graceful=False)
    told[name] = {"rows": rows, "nodes": sorted(nodes)}
told["cpus_left"] = reading_cpus()
print(json.dumps(told))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_rows_are_read_on_data_nodes_and_elsewhere_once_those_are_lost() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["cpus"], told["cpus_left"]) == (2, 1)
    assert told["confined"] == {"rows": list(range(12)), "nodes": ["data"]}
    assert told["lost"]["rows"] == list(range(12))
    assert "head" in told["lost"]["nodes"]
