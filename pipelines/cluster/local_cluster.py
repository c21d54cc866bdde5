"""Starts, finds and stops a Ray cluster of several nodes on this machine.

Each node is a process that runs local_node.py. The folder of a cluster holds its token, its logs,
and the pid and start time of each process, so another process can stop exactly this cluster. The
commands are in pipelines/commands/local_cluster.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.cluster.machine import MAX_FOLDER
from pipelines.cluster.ray_private import LOOPBACK_ONLY

if TYPE_CHECKING:
    import psutil  # inside functions below: `mantis encode` on a device needs none

PACKAGES = Path(__file__).parents[2]
NODE_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from pipelines.cluster.local_node import main; main()"
)
"""Runs a node. Its jobs bring their own code, so PYTHONPATH must not name this one."""
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 15.0
JOB_STOP_S = 8
"""Seconds in which a stopped job can close its MLflow runs. Ray's default is 3."""

POLL_INTERVAL_S = 0.2
LOG_LINES = 20
MLFLOW = "mlflow"


class LocalClusterError(ValueError):
    """Raised if a cluster cannot be started or does not exist. The message says what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Started:
    """Identifies a process by pid and start time (Unix seconds), because pids are reused."""

    name: str
    pid: int
    began: float

    def process(self) -> psutil.Process | None:
        """Returns the process, or None if it has ended."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.began and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


class LocalCluster:
    """The cluster in a folder. It may have been started by another process of this user."""

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        if len(str(folder)) > MAX_FOLDER:
            raise LocalClusterError(
                f"the folder {folder} has {len(str(folder))} characters; at most {MAX_FOLDER} "
                "leave room for the paths of Ray's sockets: give a shorter path"
            )
        self.folder = folder
        self._check_owner()
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def token_path(self) -> Path:
        """The file of the token without which the cluster refuses a job."""
        return self.folder / "auth_token"

    @property
    def address(self) -> str:
        """Returns the address for drivers, host:port."""
        return str(self._node("head")["address"])

    @property
    def job_address(self) -> str:
        """Returns the URL for `ray job submit --address`."""
        return f"http://{self._node('head')['dashboard']}"

    @property
    def addresses(self) -> dict[str, dict[str, str]]:
        """Maps each process that became ready to its services and their addresses."""
        found = {}
        if self._file("head").exists():
            found["head"] = {"address": self.address, "dashboard": self.job_address}
        if self._file(MLFLOW).exists():
            found[MLFLOW] = {"mlflow": str(self._node(MLFLOW)["address"])}
        return found

    def note_mlflow(self, uri: str) -> None:
        """Stores the URI of this cluster's MLflow server for `addresses`."""
        self._file(MLFLOW).write_text(json.dumps({"address": uri}))

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment variables that a driver or client of this cluster needs."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            LOOPBACK_ONLY: "0",
        }

    @property
    def started(self) -> list[Started]:
        """Returns the processes in the order they were started. Some may have ended."""
        with contextlib.suppress(FileNotFoundError):
            return [Started(**each) for each in json.loads(self._record.read_text())]
        return []

    @property
    def running(self) -> list[psutil.Process]:
        """Returns the processes of `started` that still run, without their descendants."""
        return [process for each in self.started if (process := each.process()) is not None]

    def pids(self, node: str) -> dict[str, int]:
        """Maps the roles of the processes of `head` or `worker-<n>` to their pids.

        Every node has `node` and `raylet`, the head also `gcs_server` and `dashboard`. Killing
        `node` ends all processes of the node.
        """
        return dict(self._node(node)["pids"])

    def start(
        self,
        *,
        workers: int = 1,
        cpus: int = 2,
        port: int = 0,
        dashboard_port: int | None = None,
    ) -> None:
        """Starts a head without CPUs and worker nodes of `cpus` logical CPUs each.

        Returns when all nodes are healthy. A port of 0 or None means any free port. Raises
        LocalClusterError if a node does not start; no process is left running then.
        """
        self._make_folder()
        try:
            options = ["--port", str(port)]
            if dashboard_port is not None:
                options += ["--dashboard-port", str(dashboard_port)]
            self._start_node("head", 0, options)
            for _ in range(workers):
                self.add_node(cpus)
        except BaseException:
            self.stop()
            raise

    def check_free(self) -> None:
        """Raises LocalClusterError if a cluster runs in the folder or it cannot be used for one."""
        if self.running:
            raise LocalClusterError(
                f"a cluster already runs in {self.folder}: nothing was started. "
                f"`mantis cluster down --folder {self.folder}` ends it."
            )
        if not self.folder.exists():
            return
        if any(self.folder.iterdir()) and not self._record.exists():
            raise LocalClusterError(f"{self.folder} holds other files: give an empty or new folder")

    def add_node(self, cpus: int, labels: Mapping[str, str] | None = None) -> str:
        """Starts a worker node with Ray labels. Returns its name when the head lists it."""
        name = f"worker-{sum(each.name.startswith('worker-') for each in self.started) + 1}"
        options = ["--join", self.address, "--labels", json.dumps(dict(labels or {}))]
        self._start_node(name, cpus, options)
        return name

    def run(
        self,
        name: str,
        command: Sequence[str],
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts a process of the cluster and waits until `ready` returns True.

        Its output goes to `<name>.log`. Raises LocalClusterError with the end of that log if the
        process ends or is not ready in START_TIMEOUT_S.
        """
        import psutil

        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._process_environment() | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children.append(child)
        began = Started(name, child.pid, psutil.Process(child.pid).create_time())
        self._record.write_text(json.dumps([asdict(each) for each in [*self.started, began]]))
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            code, late = child.poll(), time.monotonic() > deadline
            if code is not None or late:
                why = f"ended with code {code}" if code is not None else "was not ready in time"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise LocalClusterError(f"{name} {why}. The end of its log:\n{tail}")
            time.sleep(POLL_INTERVAL_S)

    def stop(self) -> None:
        """Ends all processes of the cluster, newest first, and removes the folder."""
        for each in reversed(self.started):
            _end(each)
        for child in self._children:
            child.wait()
        self._children.clear()
        if self._record.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def request(self, path: str) -> Any:
        """Gets a path from the head's HTTP server as JSON. Raises OSError if it does not answer."""
        request = urllib.request.Request(f"{self.job_address}{path}")
        request.add_header("Authorization", f"Bearer {self.token_path.read_text()}")
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def _process_environment(self) -> dict[str, str]:
        """Returns the environment of the cluster's processes. Jobs inherit it from them."""
        others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")  # may belong to another cluster and would win
        inherited = {key: value for key, value in os.environ.items() if key not in others}
        return {
            **inherited,
            **self.environment,
            # `python` in a job must be the interpreter that has the packages.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_S),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    @property
    def _record(self) -> Path:
        return self.folder / "started.json"

    def _check_owner(self) -> None:
        """Raises LocalClusterError if another user made the folder or the link to it.

        Its files name the processes to end and hold the token, so they must be this user's own.
        """
        for status in (self.folder.lstat, self.folder.stat):
            with contextlib.suppress(FileNotFoundError):
                if status().st_uid != os.getuid():
                    raise LocalClusterError(
                        f"{self.folder} belongs to another user: give another --folder"
                    )

    def _file(self, name: str) -> Path:
        """Returns the file that a process writes when it is ready."""
        return self.folder / f"{name}.json"

    def _make_folder(self) -> None:
        self.check_free()
        if self.folder.exists():
            shutil.rmtree(self.folder)  # check_free: it is empty or its cluster has ended
        self.folder.mkdir(mode=0o700)
        self._record.write_text("[]")
        self.token_path.touch(mode=0o600)
        self.token_path.write_text(secrets.token_hex(32))

    def _start_node(self, name: str, cpus: int, options: Sequence[str]) -> None:
        record = self._file(name)
        command = [sys.executable, "-P", "-c", NODE_PROGRAM, str(PACKAGES)]
        command += [str(record), "--cpus", str(cpus)]
        command += ["--temp-dir", str(self.folder / "ray"), *options]
        self.run(name, command, lambda: record.exists() and self._counts(name))

    def _counts(self, name: str) -> bool:
        """Returns True if the head answers and lists this node as alive."""
        try:
            nodes = self.request("/api/v0/nodes")["data"]["result"]["result"]
        except OSError:
            return False
        alive = {node["node_id"] for node in nodes if node["state"] == "ALIVE"}
        return self._node(name)["id"] in alive

    def _node(self, name: str) -> dict[str, Any]:
        try:
            node: dict[str, Any] = json.loads(self._file(name).read_text())
        except FileNotFoundError:
            raise LocalClusterError(
                f"there is no node {name} of a cluster in {self.folder}: start a cluster with "
                f"`mantis cluster up --folder {self.folder}`"
            ) from None
        return node


@contextlib.contextmanager
def local_cluster(*, workers: int = 1, cpus: int = 2) -> Iterator[LocalCluster]:
    """Runs a cluster in a new temporary folder inside the block."""
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="mantis-", dir="/tmp")))
    cluster.start(workers=workers, cpus=cpus)
    try:
        yield cluster
    finally:
        cluster.stop()


def _end(started: Started) -> None:
    """Terminates a process, and kills it and its descendants after END_TIMEOUT_S seconds."""
    import psutil

    process = started.process()
    if process is None:
        return
    family = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
        process.terminate()
    _, left = psutil.wait_procs(family, timeout=END_TIMEOUT_S)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(left, timeout=END_TIMEOUT_S)
