"""Runs one node of a local cluster. local_cluster.py starts `main` in a process of its own.

Does what `ray start --block` does, but on the loopback interface. `ray start` cannot do that for
more than one node on a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from pipelines.cluster import ray_private

LOOPBACK = "127.0.0.1"
POLL_INTERVAL_S = 0.5
OBJECT_STORE_BYTES = 200 * 10**6


def main() -> None:
    """Starts the node, writes its record, and runs until one of the node's processes ends.

    SIGTERM or the death of this process ends the node with all its processes.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path, help="file to write when the node runs")
    parser.add_argument(
        "--temp-dir", required=True, help="folder for Ray's files, at most 40 characters"
    )
    parser.add_argument("--cpus", type=int, required=True, help="logical CPUs of the node")
    parser.add_argument("--join", help="address of the head; without it this node is the head")
    parser.add_argument("--port", type=int, default=0, help="port of the head; 0: any free port")
    parser.add_argument("--dashboard-port", type=int, help="port of the head's dashboard")
    parser.add_argument("--labels", type=json.loads, default={}, help="Ray labels as JSON")
    node = start_node(parser.parse_args())
    while not node.dead_processes():
        time.sleep(POLL_INTERVAL_S)
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    raise SystemExit(1)


def start_node(options: argparse.Namespace) -> Any:
    """Starts Ray's processes of one node. They end with this process."""
    head = options.join is None
    node = ray_private.start_node(
        head=head,
        gcs_address=options.join,
        gcs_server_port=options.port if head else None,
        node_ip_address=LOOPBACK,
        min_worker_port=0,
        max_worker_port=0,
        num_cpus=options.cpus,
        num_gpus=0,
        object_store_memory=OBJECT_STORE_BYTES,
        temp_dir=options.temp_dir,
        # A node overwrites the files of a job when it unpacks them. In a shared folder it would do
        # so under the driver that runs on another node.
        runtime_env_dir_name=f"runtime_resources_{options.record.stem}",
        include_dashboard=head,
        dashboard_host=LOOPBACK,
        dashboard_port=options.dashboard_port,
        dashboard_agent_listen_port=0,  # Ray's fixed port may be taken by another node
        include_log_monitor=head,  # one monitor reads the logs of all nodes on a machine
        labels=options.labels,
    )
    if head:  # jobs find their cluster by this file, also if another Ray runs on this machine
        ray_private.write_address(node.gcs_address, options.temp_dir)
    record = {
        "id": node.node_id,
        "address": node.gcs_address,
        "dashboard": node.webui_url,
        "pids": {"node": os.getpid()}
        | {name: started[0].process.pid for name, started in node.all_processes.items()},
    }
    partial = options.record.with_suffix(".partial")
    partial.write_text(json.dumps(record))
    partial.replace(options.record)
    return node
