"""Every part of Ray that is not its public interface, and what stops working without it.

Ray may rename any of these without notice. PARTS and VARIABLES list them, and a test looks for
each: after a new version of Ray it names what is gone. Imports no Ray itself, because Ray reads
environment variables at import. `data_prep/ray_data.py` holds the part that `data_prep` uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A class, function or constant of Ray.

    `path` is `module:name`, `takes` are the parameters that are passed to it or read from it, and
    `breaks` is what stops working without it.
    """

    path: str
    breaks: str
    takes: tuple[str, ...] = ()


PARTS = (
    Part(
        "ray._private.node:Node",
        "mantis cluster up",
        ("head", "shutdown_at_exit", "spawn_reaper"),
    ),
    Part("ray._private.node:Node.dead_processes", "mantis cluster up"),
    Part(
        "ray._private.node:Node.kill_all_processes",
        "mantis cluster up",
        ("check_alive", "allow_graceful"),
    ),
    Part(
        "ray._private.parameter:RayParams",
        "mantis cluster up",
        (
            "gcs_address",
            "gcs_server_port",
            "node_ip_address",
            "min_worker_port",
            "max_worker_port",
            "num_cpus",
            "num_gpus",
            "object_store_memory",
            "temp_dir",
            "runtime_env_dir_name",
            "include_dashboard",
            "dashboard_host",
            "dashboard_port",
            "dashboard_agent_listen_port",
            "include_log_monitor",
            "labels",
        ),
    ),
    Part("ray._private.utils:write_ray_address", "a job on a cluster of mantis cluster up"),
    Part(
        "ray.dashboard.modules.state.state_head:StateHead.list_nodes",  # GET /api/v0/nodes
        "mantis cluster up, which waits until the head lists a node",
    ),
    Part(
        "ray.serve._private.replica:add_port_to_grpc_server",
        "mantis serve, whose replicas then listen on every interface",
        ("server", "address"),
    ),
    Part(
        "ray.train.torch.config:_TorchBackend.on_start",
        "every training on one machine: its process group on 127.0.0.1",
        ("worker_group", "backend_config"),
    ),
    Part(
        "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute_single",
        "every training on one machine",
    ),
    Part(
        "ray.train.v2._internal.execution.worker_group:WorkerGroup.execute_single_async",
        "every training on one machine",
    ),
    Part(
        "ray.train.v2._internal.execution.worker_group:WorkerGroup.get_resources_per_worker",
        "every training on one machine",
    ),
    Part(
        "ray.train.v2._internal.constants:CHECKPOINT_MANAGER_SNAPSHOT_FILENAME",
        "a resumed training, if Ray Train cannot read the notes of a killed one",
    ),
    Part(
        "ray.train.v2.api.exceptions:WorkerGroupError",
        "messages of failed trainings, which name the worker's error",
        ("worker_failures",),
    ),
    Part(
        "ray.train.v2.api.exceptions:ControllerError",
        "messages of failed trainings, which name the controller's error",
        ("controller_failure",),
    ),
    Part("ray.tune.search:Searcher.FINISHED", "the end of every search"),
    Part(
        "ray.data._internal.execution.execution_callback:ExecutionCallback.on_execution_step",
        "every stage: data_prep/ray_data.py slows Ray Data's loop",
        ("executor",),
    ),
    Part(
        "ray.data:DataContext",
        "every stage: data_prep/ray_data.py slows Ray Data's loop",
        ("custom_execution_callback_classes",),
    ),
)

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name it works on Linux: 0 keeps Ray's sockets on the loopback interface."""
LOST_HEAD_S = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Seconds until a process whose cluster has lost its head ends."""
VARIABLES = (
    LOOPBACK_ONLY,
    LOST_HEAD_S,
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_DATA_DISABLE_PROGRESS_BARS",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_JOB_STOP_WAIT_TIME_S",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_TRAIN_METRICS_ENABLED",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
    "RAY_USAGE_STATS_ENABLED",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS",
    "TUNE_DISABLE_SIGINT_HANDLER",
    "TUNE_GLOBAL_CHECKPOINT_S",
    "TUNE_PRINT_ALL_TRIAL_ERRORS",
)
"""Environment variables that Ray reads. It ignores one that it no longer knows, without a word."""

TRAIN_NOTES = "checkpoint_manager_snapshot.json"
"""The file in which Ray Train notes its checkpoints."""


def start_node(*, head: bool, **parameters: Any) -> Any:
    """Starts a node whose processes end with this one. `parameters` are those of RayParams."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    return Node(RayParams(**parameters), head=head, shutdown_at_exit=True, spawn_reaper=True)


def write_address(address: str, temp_dir: str) -> None:
    """Notes the address of a cluster where its jobs look for it."""
    from ray._private.utils import write_ray_address

    write_ray_address(address, temp_dir)


def torch_backend() -> Any:
    """Returns the class that connects the workers of a training."""
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend


def replica_listens_on(host: str) -> None:
    """Keeps the server of this replica of Ray Serve on one interface, instead of all of them.

    Call it before the replica has started: it takes pickled requests from whoever reaches it.
    """
    from ray.serve._private import replica

    open_port = replica.add_port_to_grpc_server

    def on_host(server: Any, address: str) -> Any:
        return open_port(server, f"{host}:{address.rsplit(':', 1)[1]}")

    replica.add_port_to_grpc_server = on_host
