"""A Ray cluster of several nodes on this machine: starts it, knows it again, ends just that.

A node is a process of local_node.py. All that is known of a cluster stands in its folder: token,
logs, and pids with the time each process began. The commands on it are in cli_local_cluster.py.
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
from typing import Any

import psutil

MAX_FOLDER = 36
"""Characters: Ray adds 70, and the path of a Unix socket has at most 107."""
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 15.0
JOB_STOP_S = 8
"""Seconds a stopped job has to close its MLflow runs; Ray's own default is 3."""
POLL_INTERVAL_S = 0.2
LOG_LINES = 20
MLFLOW = "mlflow"


class LocalClusterError(ValueError):
    """A cluster that cannot be started or is not there; the message says what to do."""

    exit_code = 2


@dataclass(frozen=True)
class Started:
    """A process by pid and the time it began (s since 1970): pids are given to others later."""

    name: str
    pid: int
    began: float

    def process(self) -> psutil.Process | None:
        """The process, or None if it has ended."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if process.create_time() == self.began and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


class LocalCluster:
    """The cluster of a folder, whether this process started it or another one."""

    def __init__(self, folder: Path) -> None:
        folder = folder.absolute()
        if len(str(folder)) > MAX_FOLDER:
            raise LocalClusterError(
                f"the folder {folder} has {len(str(folder))} characters, at most {MAX_FOLDER} "
                "leave room for the paths of Ray's sockets: give a shorter one"
            )
        self.folder = folder
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def token_path(self) -> Path:
        return self.folder / "auth_token"

    @property
    def address(self) -> str:
        """What a driver joins, host:port."""
        return str(self._node("head")["address"])

    @property
    def job_address(self) -> str:
        """What `ray job submit --address` takes."""
        return f"http://{self._node('head')['dashboard']}"

    @property
    def addresses(self) -> dict[str, dict[str, str]]:
        """Process to where it is reached, by what is there; of those that have been ready once."""
        found = {}
        if self._file("head").exists():
            found["head"] = {"address": self.address, "dashboard": self.job_address}
        if self._file(MLFLOW).exists():
            found[MLFLOW] = {"mlflow": str(self._node(MLFLOW)["address"])}
        return found

    def note_mlflow(self, uri: str) -> None:
        """Keeps where the MLflow server of this cluster is reached, for `addresses`."""
        self._file(MLFLOW).write_text(json.dumps({"address": uri}))

    @property
    def environment(self) -> dict[str, str]:
        """What a driver or a client of this cluster needs in its environment."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            # Despite its name, on Linux too: 0 keeps Ray on the loopback interface.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    @property
    def started(self) -> list[Started]:
        """What was started, in order; some may have ended since."""
        with contextlib.suppress(FileNotFoundError):
            return [Started(**each) for each in json.loads(self._record.read_text())]
        return []

    @property
    def running(self) -> list[psutil.Process]:
        """Those of `started` that have not ended; what they started are their descendants."""
        return [process for each in self.started if (process := each.process()) is not None]

    def pids(self, node: str) -> dict[str, int]:
        """Pids of `head` or `worker-<n>` by what they do: node, raylet; the head's also gcs_server
        and dashboard. Killing `node` ends all of its processes.
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
        """A head without CPUs, and nodes beside it of `cpus` logical CPUs each.

        Returns when all are healthy. Ports: 0 and None take free ones. Raises LocalClusterError,
        and leaves nothing running.
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
        """Raises LocalClusterError if a cluster runs in the folder, or it is not for one."""
        if self.running:
            raise LocalClusterError(
                f"a cluster runs already, its folder is {self.folder}: nothing was started. "
                f"`mantis cluster down --folder {self.folder}` ends it."
            )
        if not self.folder.exists():
            return
        if self.folder.stat().st_uid != os.getuid():
            raise LocalClusterError(f"{self.folder} is another user's: give another folder")
        if any(self.folder.iterdir()) and not self._record.exists():
            raise LocalClusterError(f"{self.folder} holds other files: give a folder to make")

    def add_node(self, cpus: int, labels: Mapping[str, str] | None = None) -> str:
        """Starts one more node, with these labels of Ray's; returns its name once it is counted."""
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
        """Starts a process of the cluster and waits until `ready`; its output is `<name>.log`.

        Raises LocalClusterError with the end of that log.
        """
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
        """Ends what was started, the newest first, and removes the folder."""
        for each in reversed(self.started):
            _end(each)
        for child in self._children:
            child.wait()
        self._children.clear()
        if self._record.exists():
            shutil.rmtree(self.folder, ignore_errors=True)

    def request(self, path: str) -> Any:
        """JSON of a path of the head's HTTP server. Raises OSError while it does not answer."""
        request = urllib.request.Request(f"{self.job_address}{path}")
        request.add_header("Authorization", f"Bearer {self.token_path.read_text()}")
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def _process_environment(self) -> dict[str, str]:
        """This process's, with what the cluster's processes, and by them its jobs, are to find."""
        others = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")  # of another cluster; both would win over ours
        inherited = {key: value for key, value in os.environ.items() if key not in others}
        return {
            **inherited,
            **self.environment,
            # A job says `python` and means the one that has the packages.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
            "RAY_JOB_STOP_WAIT_TIME_S": str(JOB_STOP_S),
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    @property
    def _record(self) -> Path:
        return self.folder / "started.json"

    def _file(self, name: str) -> Path:
        """What a process says of itself once it is ready."""
        return self.folder / f"{name}.json"

    def _make_folder(self) -> None:
        self.check_free()
        if self.folder.exists():
            shutil.rmtree(self.folder)  # empty, or of a cluster that has ended
        self.folder.mkdir(mode=0o700)
        self._record.write_text("[]")
        self.token_path.touch(mode=0o600)
        self.token_path.write_text(secrets.token_hex(32))

    def _start_node(self, name: str, cpus: int, options: Sequence[str]) -> None:
        script = Path(__file__).with_name("local_node.py")
        record = self._file(name)
        command = [sys.executable, "-P", str(script), str(record), "--cpus", str(cpus)]
        command += ["--temp-dir", str(self.folder / "ray"), *options]
        self.run(name, command, lambda: record.exists() and self._counts(name))

    def _counts(self, name: str) -> bool:
        """Whether the head answers and counts this node among those alive."""
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
                f"no node {name} of a cluster in {self.folder}: start one with "
                f"`mantis cluster up --folder {self.folder}`"
            ) from None
        return node


@contextlib.contextmanager
def local_cluster(*, workers: int = 1, cpus: int = 2) -> Iterator[LocalCluster]:
    """A cluster in a folder of its own, for the length of the block."""
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="mantis-", dir="/tmp")))
    cluster.start(workers=workers, cpus=cpus)
    try:
        yield cluster
    finally:
        cluster.stop()


def _end(started: Started) -> None:
    """Ends a process and its descendants: asks it, and kills what is left after END_TIMEOUT_S."""
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
