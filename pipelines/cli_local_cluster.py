"""The commands behind `make cluster-local`: a cluster on this machine with an MLflow server.

python -m pipelines.cli_local_cluster up | status | down
"""

from __future__ import annotations

import os
import shlex
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli_errors import FAILURE, Stopped, ending_well
from pipelines.local_cluster import LocalCluster, LocalClusterError
from pipelines.local_node import LOOPBACK

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Folder = Annotated[
    Path, typer.Option("--folder", help="its token, logs and sockets, gone when it ends; short")
]
DEFAULT_FOLDER = Path(f"/tmp/mantis-cluster-{os.getuid()}")
MLFLOW_PORT = 5000
RUN = "python -m pipelines run --config configs/quickstart.yaml"


@app.command()
@ending_well
def up(
    workers: Annotated[int, typer.Option("--workers", min=1, help="nodes beside the head")] = 1,
    cpus: Annotated[
        int, typer.Option("--cpus", min=1, help="a worker node counts with; may exceed the machine")
    ] = max(2, os.cpu_count() or 2),
    port: Annotated[int, typer.Option("--port", help="of the head; 0: any free one")] = 0,
    dashboard_port: Annotated[
        int | None, typer.Option("--dashboard-port", help="takes jobs; default from 8265 on")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option("--mlflow-port", help="default 5000, or any free one")
    ] = None,
    mlflow_store: Annotated[
        str | None,
        typer.Option(
            "--mlflow-store",
            envvar="MLFLOW_BACKEND_STORE_URI",
            help="such as postgresql://user:password@host/database; default sqlite under --root",
        ),
    ] = None,
    root: Annotated[Path, typer.Option("--root", help="for results and MLflow's files")] = Path(
        "runs"
    ),
    folder: Folder = DEFAULT_FOLDER,
) -> None:
    """Starts a head, worker nodes and an MLflow server, and says how to submit a job."""
    root = root.resolve()
    cluster = LocalCluster(folder)
    cluster.check_free()
    typer.echo(f"starting a head, worker nodes ({workers}) and MLflow", err=True)
    cluster.start(workers=workers, cpus=cpus, port=port, dashboard_port=dashboard_port)
    try:
        tracking_uri = start_mlflow(cluster, root / "mlflow-server", mlflow_port, mlflow_store)
        typer.echo(how_to_submit(cluster, root, tracking_uri))
    except BaseException:
        cluster.stop()
        raise


@app.command()
@ending_well
def status(folder: Folder = DEFAULT_FOLDER) -> None:
    """Says which of the processes that were started run; exit code 1 if one does not."""
    started = LocalCluster(folder).started
    for each in started:
        typer.echo(f"{each.name}  pid {each.pid}  {'runs' if each.process() else 'has ended'}")
    if not started or not all(each.process() for each in started):
        raise Stopped(
            f"{'parts have ended of the' if started else 'no'} cluster in {folder}", FAILURE
        )


@app.command()
@ending_well
def down(folder: Folder = DEFAULT_FOLDER) -> None:
    """Ends what `up` started, and nothing else. Results and MLflow's files stay."""
    cluster = LocalCluster(folder)
    ended = [each.name for each in cluster.started if each.process()]
    if not cluster.started:
        typer.echo(f"no cluster in {folder}")
        return
    cluster.stop()
    typer.echo(f"ended {', '.join(ended) or 'nothing: all had ended before'}")


def start_mlflow(cluster: LocalCluster, folder: Path, port: int | None, store: str | None) -> str:
    """Starts an MLflow server that keeps artifacts below `folder`, and returns its URI.

    Clients send artifacts to the server, so no node needs its disk. Raises LocalClusterError.
    """
    found = free_port(port or MLFLOW_PORT)
    if port and found != port:
        raise LocalClusterError(f"port {port} is in use: give another --mlflow-port, or none")
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"http://{LOOPBACK}:{found}"
    command = [sys.executable, "-m", "mlflow", "server", "--serve-artifacts", "--workers", "1"]
    command += ["--artifacts-destination", (folder / "artifacts").as_uri()]
    command += ["--host", LOOPBACK, "--port", str(found)]
    environment = {
        # Not as an option: a password on a command line can be read by all users of the machine.
        "MLFLOW_BACKEND_STORE_URI": store or f"sqlite:///{folder / 'mlflow.db'}",
        # Nine processes for evaluations by language models.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    cluster.run("mlflow", command, lambda: _answers(f"{uri}/health"), environment)
    return uri


def free_port(wanted: int) -> int:
    """`wanted` if nothing listens there on the loopback interface, else any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError:
            probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def how_to_submit(cluster: LocalCluster, root: Path, tracking_uri: str) -> str:
    """What a user types next, ready to be pasted."""
    token = shlex.quote(str(cluster.token_path))
    ray = shlex.quote(str(Path(sys.executable).with_name("ray")))
    address = f"--address {cluster.job_address}"
    places = f"{shlex.quote(f'storage.root={root.as_uri()}')} tracking.uri={tracking_uri}"
    return f"""\
Jobs and dashboard: {cluster.job_address}    MLflow: {tracking_uri}
In every shell that uses them:
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}
  export MLFLOW_TRACKING_URI={tracking_uri}
Submit the quickstart; the same line with a new --submission-id goes on where a job ended:
  {ray} job submit {address} --submission-id quickstart-1 --working-dir . -- \\
    {RUN} \\
    {places}
Stop it:
  {ray} job stop {address} quickstart-1
Models it registered:
  {shlex.quote(sys.executable)} -m pipelines models
End all of this: make cluster-local-down"""


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


if __name__ == "__main__":
    app(prog_name="python -m pipelines.cli_local_cluster")
