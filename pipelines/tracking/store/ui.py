"""Serves MLflow's pages of a store on this machine alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from pipelines.tracking.store.client import asking, sqlite_file, writing

LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


class UiFailed(ValueError):
    """Raised if the pages cannot be served. The message says what to do."""

    exit_code = 2


def serve(uri: str, port: int, *, started: Callable[[str], None]) -> None:
    """Serves the pages of a store until Ctrl-C, then ends the server.

    `started` is called with a line that names the address. Raises UiFailed if the port is in use or
    the server ends by itself, TrackingError if the store cannot be read.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise UiFailed(f"port {port} cannot be used ({error.strerror}): give --port") from error
    with asking(uri) as client:
        if sqlite_file(uri) is None:
            client.search_experiments(max_results=1)
        else:
            with writing(uri):  # after a move, the pages show the files that lie here
                pass
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", LOOPBACK, "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,  # not on the command line: it may hold a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    # In a session of its own, so Ctrl-C reaches this process alone and ends the server in order.
    server = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_until_open(server, port)
        started(f"MLflow's pages are at http://{LOOPBACK}:{port}    Ctrl-C ends them")
        server.wait()
        raise UiFailed(f"MLflow's server ended by itself (exit code {server.returncode})")
    except KeyboardInterrupt:
        return
    finally:
        _end(server)


def _wait_until_open(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise UiFailed(f"MLflow's server did not start (exit code {server.returncode})")
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port), timeout=1):
            return
        time.sleep(0.2)
    raise UiFailed(f"MLflow's server did not answer within {START_TIMEOUT_S:.0f} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_TIMEOUT_S)
            return
