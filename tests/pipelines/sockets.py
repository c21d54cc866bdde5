"""Where processes listen, for tests of what can be reached from outside this machine."""

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


def listening(processes: Iterable[psutil.Process]) -> set[str]:
    """Addresses on which one of them takes TCP connections, IPv4 in its own spelling."""
    hosts = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    hosts.add(connection.laddr.ip.removeprefix("::ffff:"))
    return hosts
