"""Processes of a run or a cluster as tests look at them: which there are, where they listen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def family(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """These processes and all their descendants that run now."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [root, *root.children(recursive=True)]
    return found


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; one that only waits to be reaped by its parent has."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def runs(process: psutil.Process, title: str) -> bool:
    """Whether it is there and its title holds these words."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return title in " ".join(process.cmdline())
    return False


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """Addresses on which one of them takes TCP connections, IPv4 in its own spelling."""
    hosts = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    hosts.add(connection.laddr.ip.removeprefix("::ffff:"))
    return hosts
