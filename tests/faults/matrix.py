"""The fault matrix: a stage times a kind of process that is killed with -9 in the middle of it.

    python -m tests.faults.matrix [--cells stage1:raylet,tune:driver] [--local]

Cells share a run of the chain or of the search, in which one process after another dies: in each
training one an epoch. Prints a table and, last, a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import yaml
from mlflow import MlflowClient

from mantis_core.folders import sha256_file
from pipelines.cluster.local_cluster import LocalCluster
from tests.faults.harness import PATIENCE_S, Command, kill, title_of, titled, wait_for
from tests.pipelines.experiment import paint, write_config
from tests.root import ROOT

EPOCHS = 8
EXIT_S = 60.0
"""A command that does not recover ends in so many seconds, and says how to resume."""
TRAININGS = ("teacher", "stage1", "stage2")
TITLES = {
    "train worker": "ray::RayTrainWorker",
    "data worker": "(read_window)",
    "evaluation actor": "(ArmActor)).submit",  # while it has a batch
    "trial": "train_trial",
    "gcs": "/gcs_server",
}
"""What tells a process of a kind by its title. A driver is known, a raylet by who works there."""


@dataclass(frozen=True)
class Cell:
    stage: str
    victim: str

    def __str__(self) -> str:
        return f"{self.stage}:{self.victim}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    `seconds` from the kill to the next sign of work, if it recovered by itself, else to its exit;
    `resumed_s` from the start of the resuming command to the first sign of the stage's work.
    `twice` counts the epochs that were finished again.
    """

    cell: str
    recovered: bool
    code: int | None
    seconds: float
    told_resume: bool
    resumed_s: float | None
    twice: int


@dataclass(frozen=True)
class Moment:
    """When a cell's process dies: in an epoch of a training, or while the evaluation runs.

    `label` begins the lines that are printed of the cell's stage or trial.
    """

    cell: Cell
    label: str
    epoch: int = 0

    @property
    def pattern(self) -> str:
        """The line after which it is time: the cell before may have taken an epoch more."""
        told = f"epoch [{self.epoch}-{EPOCHS}]/" if self.epoch else "(started|resuming)"
        return f"{self.label}: {told}"

    @property
    def back(self) -> str:
        """The line that shows that a command which resumes is there again."""
        told = "(epoch|ran|resumed|finished)" if self.epoch else "(started|resuming)"
        return f"{self.label}: {told}"


RUN = ("run", "--config", "config.yaml")
TUNE = ("tune", "--config", "config.yaml", "--space", "film", "--trials", "2")
VICTIMS = {"train worker": 1, "data worker": 3, "driver": 5, "gcs": 7}
"""What dies in a training, and after which epoch."""
# In this order: in an evaluation that recovers there is nothing left to kill.
EVALUATION_VICTIMS = ("gcs", "driver", "data worker", "evaluation actor")
CAMPAIGNS: tuple[tuple[tuple[str, ...], list[Moment]], ...] = (
    (
        RUN,
        [Moment(Cell(stage, v), stage, n) for stage in TRAININGS for v, n in VICTIMS.items()]
        + [Moment(Cell("evaluate", victim), "evaluate") for victim in EVALUATION_VICTIMS],
    ),
    (
        RUN,
        [Moment(Cell(stage, "raylet"), stage, 1) for stage in TRAININGS]
        + [Moment(Cell("evaluate", "raylet"), "evaluate")],
    ),
    (
        TUNE,
        [Moment(Cell("tune", victim), "trial 0", n) for victim, n in VICTIMS.items()]
        + [
            Moment(Cell("tune", "trial"), "trial 1", 1),
            Moment(Cell("tune", "raylet"), "trial 1", 3),
        ],
    ),
)
CELLS = tuple(moment.cell for _, moments in CAMPAIGNS for moment in moments)
"""A training has no evaluation actor, an evaluation no training worker; trials are a search's."""


class Experiment:
    """A folder with images and a config in which every stage trains; what it leaves is compared."""

    def __init__(self, folder: Path, *, images: Path | None = None) -> None:
        self.folder = folder
        folder.mkdir()
        if images is None:
            paint(folder / "images", train=60)
        path = write_config(folder)
        config = yaml.safe_load(path.read_text())
        config["data"]["root"] = str(images or folder / "images")
        config["storage"]["root"] = f"file://{folder}/runs"  # a cluster asks for a URI
        training = {"epochs": EPOCHS, "batch_size": 16}
        config["teacher"] |= {"weights": "train", "training": training}
        config["cluster"]["data_cpus"] = 2  # so that a search has one trial at a time on a cluster
        config["evaluate"] = {"baselines": ["oracle"], "batch_size": 8}
        config |= {"stage1": training, "stage2": training, "tune": {"stop_early": False}}
        path.write_text(yaml.safe_dump(config))
        self.config = path

    @property
    def images(self) -> Path:
        return Path(yaml.safe_load(self.config.read_text())["data"]["root"])

    def weights(self) -> dict[str, str]:
        """The sha256 of what each training stage left, by the stage's folder."""
        return {
            path.parents[1].name: sha256_file(path)
            for path in sorted((self.folder / "runs/stages").rglob("weights.safetensors"))
        }

    def logged(self) -> dict[str, list[int]]:
        """The steps of train/loss that MLflow has of each run of a training stage."""
        client = MlflowClient(tracking_uri=f"sqlite:///{self.folder / 'runs/mlflow.db'}")
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        names = {run.info.run_id: run.data.tags.get("mantis.stage", "") for run in runs}
        return {
            f"{name}-{run_id[:6]}": [
                metric.step for metric in client.get_metric_history(run_id, "train/loss")
            ]
            for run_id, name in names.items()
            if name in (*TRAININGS, "extend")
        }


class LocalRay:
    """The Ray that a command starts for itself; the next command starts its own."""

    environment: Mapping[str, str] = {}

    def pids(self, command: Command) -> list[int]:
        """What the processes of Ray are below."""
        return [command.process.pid]

    def mend(self) -> None:
        """Brings back what was killed and what a command does not start."""


class ClusterRay(LocalRay):
    """A cluster of a head and two workers, each a set of processes; commands join it."""

    def __init__(self) -> None:
        self.cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="mantis-", dir="/tmp")))
        self.port = 0

    @property
    def environment(self) -> Mapping[str, str]:  # type: ignore[override]
        return {**self.cluster.environment, "RAY_ADDRESS": self.cluster.address}

    def pids(self, command: Command) -> list[int]:
        return [each.pid for each in self.cluster.started]

    def mend(self) -> None:
        """Nodes end with their raylet; a cluster without a head begins anew at its old address."""
        alive = [each.name for each in self.cluster.started if each.process()]
        if "head" not in alive:
            self.cluster.stop()
            self.cluster.start(workers=2, port=self.port)
            self.port = int(self.cluster.address.rpartition(":")[2])
        elif len(alive) < 3:
            self.cluster.add_node(2)

    def __enter__(self) -> ClusterRay:
        os.environ["PYTHONPATH"] = str(ROOT)  # a job would bring its code; these workers have none
        self.mend()
        return self

    def __exit__(self, *error: object) -> None:
        self.cluster.stop()


def campaign(
    experiment: Experiment, arguments: Sequence[str], moments: Sequence[Moment], ray: LocalRay
) -> list[Outcome]:
    """Runs a command, kills a process at every moment, and runs what the command says resumes it,
    until it ends well."""
    outcomes: dict[Moment, Outcome] = {}
    waiting, output = list(moments), ""
    lost: Moment | None = None
    while True:
        ray.mend()
        with Command(arguments, experiment.folder, ray.environment) as command:
            if lost is not None:
                back = command.line(lost.back)
                assert back is not None, command.output[-3000:]
                outcomes[lost] = replace(outcomes[lost], resumed_s=round(back - command.began, 1))
                lost = None
            while waiting and lost is None:
                moment = waiting.pop(0)
                ray.mend()
                outcomes[moment] = strike(command, moment, ray)
                print(outcomes[moment], file=sys.stderr, flush=True)
                lost = None if outcomes[moment].recovered else moment
            if lost is None:
                assert command.end(PATIENCE_S) is not None, "the command hangs:\n" + command.output
        output += command.output
        if lost is None:
            assert command.process.returncode == 0, command.output[-3000:]
            return [counted(outcomes[moment], moment.label, output) for moment in moments]
        assert command.resume, command.output[-3000:]
        arguments = command.resume


def strike(command: Command, moment: Moment, ray: LocalRay) -> Outcome:
    """Kills the process that is meant when it is time; what the command does then."""
    victim = moment.cell.victim
    assert command.line(moment.pattern) is not None, command.output[-3000:]
    if not moment.epoch and victim != "data worker":
        wait_for(lambda: worker(command, moment, ray), "evaluation actor")
    if victim == "driver":
        command.process.kill()
        killed = time.monotonic()
    elif victim == "raylet":
        killed = kill(lambda: raylet_of(worker(command, moment, ray)), "/raylet/raylet")
    else:
        title = TITLES[victim]
        killed = kill(lambda: next(titled(ray.pids(command), title), None), title)
    seen = sum(when <= killed for when, _ in command.lines)
    if victim in ("driver", "gcs"):  # an epoch's end may still be told, but it cannot go on
        assert command.end(PATIENCE_S) is not None, "the command hangs:\n" + command.output
        goes_on = None
    elif moment.epoch or victim == "data worker":
        goes_on = works(command, moment, ray, since=seen)
    else:
        goes_on = command.line(f"{moment.label}: (ran|resumed)", since=seen)
    over = goes_on or command.end(0)
    assert over is not None
    return Outcome(
        cell=str(moment.cell),
        recovered=goes_on is not None,
        code=None if goes_on else command.process.returncode,
        seconds=round(over - killed, 1),
        told_resume=bool(command.resume),
        resumed_s=None,
        twice=0,
    )


def worker(command: Command, moment: Moment, ray: LocalRay) -> psutil.Process | None:
    """A process that does the work of the moment's stage."""
    title = TITLES["train worker" if moment.epoch else "evaluation actor"]
    return next(titled(ray.pids(command), title), None)


def works(command: Command, moment: Moment, ray: LocalRay, *, since: int) -> float | None:
    """When the stage showed, from line `since` on, that it works; None if the command ended."""
    if moment.epoch:
        return command.line(moment.back, since=since)
    return wait_for(lambda: worker(command, moment, ray), "evaluation actor")


def raylet_of(worker: psutil.Process | None) -> psutil.Process | None:
    """The raylet of the node that a process works on."""
    parents = worker.parents() if worker is not None else []
    return next((each for each in parents if "/raylet/raylet" in title_of(each)), None)


def counted(outcome: Outcome, label: str, output: str) -> Outcome:
    """With the number of epochs that were finished more than once."""
    epochs = re.findall(rf"^{label}: epoch (\d+)/", output, re.MULTILINE)
    return replace(outcome, twice=len(epochs) - len(set(epochs)))


def complaints(experiment: Experiment, outcomes: Sequence[Outcome]) -> list[str]:
    """What is wrong with the outcomes, and with what the experiment left; empty if all is well."""
    found = []
    for outcome in outcomes:
        if not outcome.recovered and (outcome.code == 0 or not outcome.told_resume):
            found.append(f"{outcome.cell}: exit code {outcome.code}, resume {outcome.told_resume}")
        if not outcome.recovered and outcome.seconds > EXIT_S:
            found.append(f"{outcome.cell}: ended after {outcome.seconds} s")
        if outcome.twice:
            found.append(f"{outcome.cell}: {outcome.twice} epochs were finished twice")
    whole = list(range(1, EPOCHS + 1))
    for run, steps in experiment.logged().items():
        if steps != whole:
            found.append(f"MLflow has of {run} the epochs {steps}, not {whole}")
    return found


def selected(names: str | None) -> list[Cell]:
    """The cells named `stage:victim,...`; all of them without names."""
    known = {str(cell): cell for cell in CELLS}
    wanted = names.split(",") if names else list(known)
    if unknown := set(wanted) - known.keys():
        raise SystemExit(f"no such cells: {sorted(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", help="stage:victim,... ; default all")
    parser.add_argument("--local", action="store_true", help="the Ray each command starts itself")
    options = parser.parse_args()
    cells = selected(options.cells)
    with tempfile.TemporaryDirectory(prefix="mantis-faults-") as temporary:
        if options.local:
            rows, wrong = run_matrix(cells, Path(temporary), LocalRay())
        else:
            with ClusterRay() as ray:
                rows, wrong = run_matrix(cells, Path(temporary), ray)
    print(table(rows))
    print(json.dumps({"cells": [asdict(row) for row in rows], "wrong": wrong}))
    raise SystemExit(1 if wrong else 0)


def run_matrix(
    cells: Sequence[Cell], folder: Path, ray: LocalRay
) -> tuple[list[Outcome], list[str]]:
    """The outcomes of these cells, and all that is wrong with them."""
    rows: list[Outcome] = []
    wrong: list[str] = []
    unkilled = Experiment(folder / "unkilled")
    for number, (arguments, moments) in enumerate(CAMPAIGNS):
        chosen = [moment for moment in moments if moment.cell in cells]
        if not chosen:
            continue
        experiment = Experiment(folder / str(number), images=unkilled.images)
        try:
            outcomes = campaign(experiment, arguments, chosen, ray)
        except AssertionError as error:  # the other campaigns can still tell something
            wrong.append(f"{', '.join(str(moment.cell) for moment in chosen)}: {error}")
            continue
        rows += outcomes
        wrong += complaints(experiment, outcomes)
        if arguments == RUN:
            if not unkilled.weights():
                campaign(unkilled, RUN, [], ray)
            wrong += differing(experiment, unkilled)
    return rows, wrong


def differing(experiment: Experiment, unkilled: Experiment) -> list[str]:
    """Stages whose weights are not, bit for bit, those of the unkilled run."""
    found, wanted = experiment.weights(), unkilled.weights()
    return [f"weights of {name} differ" for name in wanted if found.get(name) != wanted[name]]


def table(rows: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    lines = ["| cell | outcome | seconds | resumed, s | epochs twice |", "| --- " * 5 + "|"]
    for row in rows:
        outcome = "recovers" if row.recovered else f"exit code {row.code}, says how to resume"
        resumed = "" if row.resumed_s is None else f"{row.resumed_s:.0f}"
        lines.append(f"| {row.cell} | {outcome} | {row.seconds:.1f} | {resumed} | {row.twice} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
