"""Connects the workers of a training. With a Ray on the loopback interface they stay on it too.

torch's own store listens on all interfaces, even if it gets the address of one.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in __all__

from pipelines.cluster.ray_private import torch_backend

TorchBackend: Any = torch_backend()
LOOPBACK, LOOPBACK_INTERFACE = "127.0.0.1", "lo"
_STORES: list[TCPStore] = []  # keeps the store of this worker alive until the process ends


def torch_config(timeout_s: float) -> TorchConfig:
    """Returns the loopback config if Ray is on the loopback interface, else that of Ray.

    Ray must be connected.
    """
    local = ray.util.get_node_ip_address() == LOOPBACK
    return (LoopbackTorchConfig if local else TorchConfig)(timeout_s=int(timeout_s))


class LoopbackTorchConfig(TorchConfig):
    """Configures a process group whose sockets are bound to 127.0.0.1."""

    @property
    def backend_cls(self) -> type[Any]:
        return LoopbackBackend


class LoopbackBackend(TorchBackend):
    """Starts the group with a store on rank 0. Inherits everything else from Ray."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        port = worker_group.execute_single(0, serve_store)
        joining = [
            worker_group.execute_single_async(
                rank, join, backend, rank, len(worker_group), port, backend_config.timeout_s
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)


def serve_store() -> int:
    """Starts a store in this process and returns its port."""
    listener = socket.create_server((LOOPBACK, 0))
    port = int(listener.getsockname()[1])
    store = TCPStore(
        LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    _STORES.append(store)
    return port


def join(backend: str, rank: int, size: int, port: int, timeout_s: int) -> None:
    """Joins this process to a group of `size` through the store at `port`."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(LOOPBACK, port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
