"""The commands `mantis cluster up | status | down`: a local Ray cluster with an MLflow server."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cluster.local_cluster import MLFLOW, LocalCluster, LocalClusterError
from pipelines.cluster.local_node import LOOPBACK
from pipelines.cluster.machine import usable_cpus
from pipelines.commands.errors import FAILURE, Stopped, ending_well, print_json
from pipelines.commands.options import AsJson

app = typer.Typer(
    help="Start, show and stop a Ray cluster with MLflow on this machine.",
    no_args_is_help=True,
)

Folder = Annotated[
    Path,
    typer.Option(
        "--folder",
        help="Folder of the cluster's token, logs and sockets. The path must be short. `down` "
        "removes it.",
    ),
]

# Not below XDG_RUNTIME_DIR, which a logout removes while the cluster runs on.
DEFAULT_FOLDER = Path(f"/tmp/mantis-cluster-{os.getuid()}")
MLFLOW_PORT = 5000
RUN = "python -m pipelines run --config configs/quickstart.yaml"


@app.command()
@ending_well
def up(
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Worker nodes beside the head.")
    ] = 1,
    cpus: Annotated[
        int,
        typer.Option(
            "--cpus",
            min=1,
            help="CPUs that a worker node offers. The sum may exceed those of the machine.",
        ),
    ] = max(2, usable_cpus()),
    port: Annotated[
        int, typer.Option("--port", help="Port of the head. 0 takes any free port.")
    ] = 0,
    dashboard_port: Annotated[
        int | None,
        typer.Option(
            "--dashboard-port",
            help="Port of the dashboard, which accepts jobs. The default is the first free one "
            "from 8265.",
        ),
    ] = None,
    mlflow_port: Annotated[
        int | None,
        typer.Option(
            "--mlflow-port",
            help="Port of MLflow. The default is 5000, or any free port if it is in use.",
        ),
    ] = None,
    mlflow_store: Annotated[
        str | None,
        typer.Option(
            "--mlflow-store",
            envvar="MLFLOW_BACKEND_STORE_URI",
            help="MLflow's database, such as postgresql://USER:PW@HOST/NAME. The default is "
            "an SQLite file under --root.",
        ),
    ] = None,
    root: Annotated[
        Path, typer.Option("--root", help="Folder of results and of MLflow's files.")
    ] = Path("runs"),
    folder: Folder = DEFAULT_FOLDER,
    as_json: AsJson = False,
) -> None:
    """Start a head, worker nodes and an MLflow server.

    Prints the commands that submit and stop a job.

    Example: mantis cluster up --workers 2
    """
    root = root.resolve()
    cluster = LocalCluster(folder)
    cluster.check_free()
    typer.echo(f"starting a head, worker nodes ({workers}) and MLflow", err=True)
    cluster.start(workers=workers, cpus=cpus, port=port, dashboard_port=dashboard_port)
    try:
        tracking_uri = start_mlflow(cluster, root / "mlflow-server", mlflow_port, mlflow_store)
    except BaseException:
        cluster.stop()
        raise
    if as_json:
        print_json(what_runs(cluster))
    else:
        typer.echo(how_to_submit(cluster, root, tracking_uri))


@app.command()
@ending_well
def status(folder: Folder = DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """Show which processes run and their addresses.

    The exit code is 1 if any of them has ended.

    Example: mantis cluster status
    """
    found = what_runs(LocalCluster(folder))
    processes = found["processes"]
    if as_json:
        print_json(found)
    else:
        for each in processes:
            state = "runs" if each["runs"] else "has ended"
            typer.echo(f"{each['name']}  pid {each['pid']}  {state}")
        for name, address in found["addresses"].items():
            typer.echo(f"{name}: {address}")
    if not any(each["runs"] for each in processes):
        raise Stopped(f"no cluster runs in {folder}", FAILURE)
    if not all(each["runs"] for each in processes):
        raise Stopped(f"parts of the cluster in {folder} have ended", FAILURE)


@app.command()
@ending_well
def down(folder: Folder = DEFAULT_FOLDER, as_json: AsJson = False) -> None:
    """Stop the processes that `mantis cluster up` started.

    Keeps results and MLflow's files.

    Example: mantis cluster down
    """
    cluster = LocalCluster(folder)
    started = cluster.started
    ended = [each.name for each in started if each.process()]
    cluster.stop()
    if as_json:
        print_json({"folder": str(cluster.folder), "ended": ended})
    elif not started:
        typer.echo(f"no cluster in {folder}")
    else:
        typer.echo(f"ended {', '.join(ended) or 'nothing: all processes had ended before'}")


def what_runs(cluster: LocalCluster) -> dict[str, Any]:
    """Returns what `up` and `status` print as JSON: processes, and addresses of those running."""
    processes = [
        {"name": each.name, "pid": each.pid, "runs": each.process() is not None}
        for each in cluster.started
    ]
    running = {each["name"] for each in processes if each["runs"]}
    addresses = {
        name: address
        for part, places in cluster.addresses.items()
        if part in running
        for name, address in places.items()
    }
    return {"folder": str(cluster.folder), "processes": processes, "addresses": addresses}


def start_mlflow(cluster: LocalCluster, folder: Path, port: int | None, store: str | None) -> str:
    """Starts an MLflow server that keeps artifacts below `folder`, and returns its URI.

    Clients send artifacts to the server, so the nodes need not share its disk. Raises
    LocalClusterError.
    """
    from pipelines.settings.tracking import sqlite_uri
    from pipelines.tracking.store.client import create_store

    found = free_port(port or MLFLOW_PORT)
    if port and found != port:
        raise LocalClusterError(
            f"port {port} is in use: give another --mlflow-port, or leave it out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"http://{LOOPBACK}:{found}"
    store = store or sqlite_uri(folder / "mlflow.db")
    create_store(store)
    command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts", "--workers", "1"]
    command += ["--artifacts-destination", (folder / "artifacts").as_uri()]
    command += ["--host", LOOPBACK, "--port", str(found)]
    environment = {
        # Not as an option: all users of the machine can read a password on a command line.
        "MLFLOW_BACKEND_STORE_URI": store,
        # Otherwise MLflow starts nine processes for evaluations by language models.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    cluster.run(MLFLOW, command, lambda: _answers(f"{uri}/health"), environment)
    cluster.note_mlflow(uri)
    return uri


def free_port(wanted: int) -> int:
    """Returns `wanted` if nothing listens there on the loopback interface, else any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError:
            probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def how_to_submit(cluster: LocalCluster, root: Path, tracking_uri: str) -> str:
    """Returns the commands for the user's next steps, ready to paste."""
    token = shlex.quote(str(cluster.token_path))
    ray = shlex.quote(str(Path(sys.executable).with_name("ray")))
    address = f"--address {cluster.job_address}"
    python = shlex.quote(sys.executable)
    elsewhere = cluster.folder != DEFAULT_FOLDER
    down = f"down --folder {shlex.quote(str(cluster.folder))}" if elsewhere else "down"
    places = f"{shlex.quote(f'storage.root={root.as_uri()}')} tracking.uri={tracking_uri}"
    return f"""\
Jobs and dashboard: {cluster.job_address}    MLflow: {tracking_uri}
In every shell that uses the cluster:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}
  export MLFLOW_TRACKING_URI={tracking_uri}
Submit the quickstart. With a new --submission-id the same line resumes a job that ended:
  {ray} job submit {address} --submission-id quickstart-1 --working-dir . -- \\
    {RUN} \\
    {places}
Stop the job:
  {ray} job stop {address} quickstart-1
Models it registered:
  {python} -m pipelines models
Stop the cluster:
  {python} -m pipelines cluster {down}"""


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
