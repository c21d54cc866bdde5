"""Is the search worth its parts? Ours and a full random search, replayed on one table of trainings.

    python -m benchmarks.search --config configs/quickstart.yaml --configurations 128 \
        stage2.epochs=9

The table holds rate-accuracy points of every epoch of configurations drawn evenly from a space.
What it lacks is trained by `mantis tune --search random` without early stopping, resumably, or,
with --plain SHARDS --jobs N, without Ray and MLflow, N trainings at once, on shards that
`mantis prepare` wrote. results/search_table.csv keeps it, and --replay-only trains nothing. The
random arm takes 64 rows and all their epochs. Our arm asks the product's own sampler, takes the
nearest row that is left, and gives up a row where the product's own rule would. Both count finished
rows only. The last line is one JSON object: `hypervolume_ratio` is that of our arm to the random
one's at 35 % of its epochs, `budget_ratio` the share of its epochs after which 99 % was reached;
each the worst of the seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from benchmarks.program import count, one_message, say
from pipelines.search import search_task
from pipelines.search_journal import TrialRecord
from pipelines.search_points import (
    Halving,
    RdPoint,
    hypervolume,
    losses_of,
    rd_point,
    worst_corner,
)
from pipelines.search_sampler import propose, random_weight
from pipelines.search_space import Params, load_space
from pipelines.settings import TuneConfig, load_settings
from tune_spaces.domains import Choice, Field, Integer, LogUniform, Space

TABLE = Path("results/search_table.csv")
FIGURES = ("holdout/bits", "holdout/top1", "holdout/loss")
RANDOM_TRIALS = 64
BUDGET = 0.35
GOAL = 0.99


@dataclass(frozen=True)
class Row:
    """A configuration that was trained to its end: its sample and the figures of each epoch."""

    params: Params
    epochs: tuple[Mapping[str, float], ...]

    @property
    def final(self) -> RdPoint:
        point = rd_point(self.epochs[-1])
        assert point is not None
        return point


@dataclass(frozen=True)
class Replay:
    """One arm with one seed: hypervolume after so many epochs, and rows begun and finished."""

    steps: tuple[tuple[int, float], ...]
    begun: int
    finished: int

    def within(self, epochs: float) -> float:
        """The hypervolume reached within a number of epochs."""
        return max((volume for used, volume in self.steps if used <= epochs), default=0.0)

    def first(self, volume: float) -> int | None:
        """The epochs after which a hypervolume was reached, if it was."""
        return next((used for used, reached in self.steps if reached >= volume), None)


def replay_random(rows: Sequence[Row], seed: int) -> tuple[Replay, RdPoint]:
    """A random search of 64 full trainings, and the reference point of both arms."""
    taken = random.Random(f"random/{seed}").sample(range(len(rows)), RANDOM_TRIALS)
    finals = [rows[index].final for index in taken]
    corner = worst_corner(finals)
    epochs = len(rows[0].epochs)
    steps = tuple(
        ((count + 1) * epochs, hypervolume(finals[: count + 1], corner))
        for count in range(RANDOM_TRIALS)
    )
    return Replay(steps, RANDOM_TRIALS, RANDOM_TRIALS), corner


def replay_search(
    rows: Sequence[Row], space: Space, tune: TuneConfig, seed: int, corner: RdPoint, budget: int
) -> Replay:
    """Our search, one trial at a time, until its budget of epochs or the table is used up."""
    epochs = len(rows[0].epochs)
    halving = Halving(epochs, tune.first_epochs, tune.reduction_factor)
    left = dict(enumerate(rows))
    records: list[TrialRecord] = []
    finals: list[RdPoint] = []
    steps: list[tuple[int, float]] = []
    used = 0
    while left and used < budget:
        number = len(records)
        wanted = propose(
            space,
            records,
            number,
            kind="optuna",
            objective="pareto",
            seed=seed,
            startup_trials=tune.startup_trials,
        )
        nearest = min(left, key=lambda index: distance(space, wanted, left[index].params))
        row, weight = left.pop(nearest), random_weight(seed, number)
        record = TrialRecord(number, row.params, weight, state="finished")
        for epoch, figures in enumerate(row.epochs, start=1):
            used += 1
            record = replace(record, epochs={**record.epochs, epoch: figures})
            if tune.stop_early and epoch in halving.rungs:
                own = losses_of(figures, "pareto")
                others = [
                    losses_of(r.epochs[epoch], "pareto") for r in records if epoch in r.epochs
                ]
                if not halving.goes_on(own, others, weight):
                    record = replace(record, state="stopped")
                    break
        records.append(record)
        if record.state == "finished":
            finals.append(row.final)
            steps.append((used, hypervolume(finals, corner)))
    return Replay(tuple(steps), len(records), len(finals))


def distance(space: Mapping[str, Field], one: Params, other: Params) -> float:
    """Between samples, each field from 0 to 1, as the crow flies."""
    return math.hypot(*(_gap(field, one[key], other[key]) for key, field in space.items()))


def rank_correlation(rows: Sequence[Row], epoch: int) -> dict[str, float]:
    """Spearman's, of each objective after an epoch with its final value."""
    names = ["wire_bytes", "top1"]
    early = pd.DataFrame([losses_of(row.epochs[epoch - 1], "pareto") for row in rows], None, names)
    late = pd.DataFrame([losses_of(row.epochs[-1], "pareto") for row in rows], None, names)
    return {name: round(float(early[name].rank().corr(late[name].rank())), 3) for name in names}


def train_table(config: str, space: str, configurations: int, overrides: Sequence[str]) -> None:
    """Trains what is missing and writes the table; ends the program if the search fails."""
    command = [sys.executable, "-m", "pipelines", "tune", "--config", config, "--space", space]
    command += ["--trials", str(configurations), "--search", "random", "--resume", "--json"]
    done = subprocess.run(
        [*command, "tune.stop_early=false", *overrides],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):  # 3: some trials failed, the others count
        sys.exit(done.returncode)
    result = json.loads(done.stdout.splitlines()[-1])
    from pipelines.search_journal import Journal
    from pipelines.storage import Store

    store = Store(result["root"])
    trials = Journal(store, result["folder"].removeprefix(f"{store.root}/")).trials.values()
    rows = [
        Row(record.params, tuple(record.epochs[epoch] for epoch in sorted(record.epochs)))
        for record in trials
        if record.state == "finished"
    ]
    write_table(TABLE, rows)


def train_table_plainly(
    config: str,
    space: Mapping[str, Field],
    configurations: int,
    prepared: str,
    jobs: int,
    overrides: Sequence[str],
) -> None:
    """The same trainings without Ray and MLflow. The table is written after each."""
    from benchmarks.plain_chain import train_plain

    task = search_task(load_settings(config, overrides), Path(config).stem)
    samples = [
        propose(space, (), n, kind="random", objective="pareto", seed=0, startup_trials=0)
        for n in range(configurations)
    ]
    plans = [task.plan(sample) for sample in samples]
    rows: dict[int, Row] = {}
    for number, history in train_plain(plans, prepared=prepared, jobs=jobs, say=say):
        rows[number] = Row(samples[number], tuple(history))
        write_table(TABLE, [rows[each] for each in sorted(rows)])


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """One line a configuration and epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        keys = sorted(rows[0].params)
        writer.writerow(["configuration", "epoch", *keys, *FIGURES])
        for number, row in enumerate(rows):
            for epoch, figures in enumerate(row.epochs, start=1):
                values = [json.dumps(row.params[key]) for key in keys]
                writer.writerow([number, epoch, *values, *(figures[name] for name in FIGURES)])


def read_table(path: Path) -> list[Row]:
    """What `write_table` wrote."""
    rows: dict[int, tuple[dict[str, Any], list[dict[str, float]]]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            number, epoch = int(line.pop("configuration")), int(line.pop("epoch"))
            figures = {name: float(line.pop(name)) for name in FIGURES} | {"epoch": float(epoch)}
            params = {key: json.loads(value) for key, value in line.items()}
            rows.setdefault(number, (params, []))[1].append(figures)
    return [Row(params, tuple(epochs)) for params, epochs in rows.values()]


def compare(
    rows: Sequence[Row], space: Space, tune: TuneConfig, seeds: Sequence[int]
) -> dict[str, Any]:
    """Both arms for every seed; worst figures first."""
    per_seed = []
    for seed in seeds:
        baseline, corner = replay_random(rows, seed)
        whole, goal = baseline.steps[-1]
        ours = replay_search(rows, space, tune, seed, corner, budget=whole)
        reached = ours.first(GOAL * goal)
        per_seed.append(
            {
                "seed": seed,
                "hypervolume_ratio": round(ours.within(BUDGET * whole) / goal, 4),
                "budget_ratio": None if reached is None else round(reached / whole, 4),
                "random_hypervolume": round(goal, 5),
                "random_at_budget": round(baseline.within(BUDGET * whole) / goal, 4),
                "begun": ours.begun,
                "finished": ours.finished,
            }
        )
    budgets = [each["budget_ratio"] for each in per_seed]
    return {
        "budget_ratio": None if None in budgets else max(budgets),
        "hypervolume_ratio": min(each["hypervolume_ratio"] for each in per_seed),
        "mean_hypervolume_ratio": round(fmean(each["hypervolume_ratio"] for each in per_seed), 4),
        "configurations": len(rows),
        "epochs": len(rows[0].epochs),
        "rank_correlation": {
            str(rung): rank_correlation(rows, rung)
            for rung in Halving(len(rows[0].epochs), tune.first_epochs, tune.reduction_factor).rungs
        },
        "seeds": per_seed,
    }


@one_message
def main() -> None:
    """Trains the table's missing rows, replays both arms, prints a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--space", default="joint")
    parser.add_argument("--configurations", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--replay-only", action="store_true", help="train nothing")
    parser.add_argument("--plain", metavar="SHARDS", help="without Ray, on these prepared shards")
    parser.add_argument("--jobs", type=count, default=1, help="with --plain: trainings at once")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    space = load_space(arguments.space, include_stage1=False)
    if arguments.plain and not arguments.replay_only:
        train_table_plainly(
            arguments.config,
            space,
            arguments.configurations,
            arguments.plain,
            arguments.jobs,
            arguments.overrides,
        )
    elif not arguments.replay_only:
        train_table(
            arguments.config, arguments.space, arguments.configurations, arguments.overrides
        )
    rows = read_table(TABLE)
    if len(rows) < 2 * RANDOM_TRIALS:
        sys.exit(f"{TABLE} has {len(rows)} configurations; {2 * RANDOM_TRIALS} are needed")
    tune = load_settings(arguments.config, arguments.overrides).tune
    result = compare(rows, space, tune, range(arguments.seeds))
    shown = Table(*result["seeds"][0])
    for each in result["seeds"]:
        shown.add_row(*map(str, each.values()))
    Console(stderr=True).print(shown)
    print(json.dumps(result))


def _gap(field: Field, one: Any, other: Any) -> float:
    match field.domain:
        case Choice():
            return float(one != other)
        case LogUniform(low, high) | Integer(low, high, log=True):
            return abs(math.log(one / other)) / math.log(high / low)
        case domain:
            return abs(one - other) / (domain.high - domain.low)


if __name__ == "__main__":
    main()
