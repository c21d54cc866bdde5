"""Compares our search with a random search by replaying both on one table of trainings.

    python -m benchmarks.search --config configs/quickstart.yaml --configurations 128 \
        stage2.epochs=9

The table holds the rate-accuracy points of every epoch of configurations that were drawn uniformly
from a space. It is stored in results/search_table.csv. Missing configurations are trained by
`mantis tune --search random` without early stopping, which can be resumed. With --plain SHARDS
--jobs N they are trained without Ray and MLflow, N at once, on shards that `mantis prepare` wrote.
--replay-only trains nothing.

The random search takes 64 rows with all their epochs. Our search draws from the sampler of `mantis
tune`, takes the nearest row that is left, and stops it by the rule of `mantis tune`. Both count
finished rows only. The last line is one JSON object with the worst figures over the seeds:
`hypervolume_ratio` is our hypervolume after 35 % of the random search's epochs divided by its final
one; `budget_ratio` is the share of its epochs after which ours reached 99 % of it.
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
from pipelines.search.journal import TrialRecord
from pipelines.search.points import (
    Halving,
    RdPoint,
    SearchObjective,
    hypervolume,
    rd_points,
    worst_corner,
)
from pipelines.search.run import search_task
from pipelines.search.sampler import propose, random_weight
from pipelines.search.space import Params, load_space
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import TuneConfig
from tune_spaces.domains import Choice, Field, Integer, LogUniform, Space

TABLE = Path("results/search_table.csv")
FIGURES = ("holdout/bits", "holdout/top1", "holdout/loss")
RANDOM_TRIALS = 64
BUDGET = 0.35
GOAL = 0.99


@dataclass(frozen=True)
class Row:
    """A fully trained configuration: its sample and the figures of each epoch."""

    params: Params
    epochs: tuple[Mapping[str, float], ...]

    @property
    def final(self) -> RdPoint:
        (point,) = rd_points(self.epochs[-1])
        return point


@dataclass(frozen=True)
class Replay:
    """A replayed search with one seed.

    `steps` holds (epochs used, hypervolume) pairs. `begun` and `finished` count rows.
    """

    steps: tuple[tuple[int, float], ...]
    begun: int
    finished: int

    def within(self, epochs: float) -> float:
        """Returns the hypervolume reached within a number of epochs."""
        return max((volume for used, volume in self.steps if used <= epochs), default=0.0)

    def first(self, volume: float) -> int | None:
        """Returns the epochs after which a hypervolume was reached, or None if it never was."""
        return next((used for used, reached in self.steps if reached >= volume), None)


def replay_random(rows: Sequence[Row], seed: int) -> tuple[Replay, RdPoint]:
    """Replays a random search of 64 full trainings. Also returns the reference of both searches."""
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
    """Replays our search, one trial at a time, until the budget of epochs or the table is used."""
    objective = SearchObjective("pareto", corner)
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
            objective=objective,
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
                own = _losses(figures, objective)
                others = [_losses(r.epochs[epoch], objective) for r in records if epoch in r.epochs]
                if not halving.goes_on(own, others, weight):
                    record = replace(record, state="stopped")
                    break
        records.append(record)
        if record.state == "finished":
            finals.append(row.final)
            steps.append((used, hypervolume(finals, corner)))
    return Replay(tuple(steps), len(records), len(finals))


def distance(space: Mapping[str, Field], one: Params, other: Params) -> float:
    """Returns the Euclidean distance of two samples, with each field scaled to [0, 1]."""
    return math.hypot(*(_gap(field, one[key], other[key]) for key, field in space.items()))


def rank_correlation(rows: Sequence[Row], epoch: int) -> dict[str, float]:
    """Returns Spearman's correlation of each objective after `epoch` with its final value."""
    names, objective = ["wire_bytes", "top1"], SearchObjective("pareto", RdPoint(math.inf, 0.0))
    early, late = (
        pd.DataFrame([_losses(row.epochs[place], objective) for row in rows], None, names)
        for place in (epoch - 1, -1)
    )
    return {name: round(float(early[name].rank().corr(late[name].rank())), 3) for name in names}


def train_table(config: str, space: str, configurations: int, overrides: Sequence[str]) -> None:
    """Trains missing configurations and writes the table. Exits if the search fails."""
    command = [sys.executable, "-m", "pipelines", "tune", "--config", config, "--space", space]
    command += ["--trials", str(configurations), "--search", "random", "--resume", "--json"]
    done = subprocess.run(
        [*command, "tune.stop_early=false", *overrides],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 3):  # 3: some trials failed; the others are used
        sys.exit(done.returncode)
    result = json.loads(done.stdout.splitlines()[-1])
    from pipelines.search.journal import Journal
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
    """Trains the same configurations without Ray and MLflow. Writes the table after each one."""
    from pipelines.chain.plain import train_plain

    task = search_task(load_settings(config, overrides), Path(config).stem)
    unused = SearchObjective("pareto", RdPoint(math.inf, 0.0))
    samples = [
        propose(space, (), n, kind="random", objective=unused, seed=0, startup_trials=0)
        for n in range(configurations)
    ]
    plans = [task.plan(sample) for sample in samples]
    rows: dict[int, Row] = {}
    for number, history in train_plain(plans, prepared=prepared, jobs=jobs, say=say):
        rows[number] = Row(samples[number], tuple(history))
        write_table(TABLE, [rows[each] for each in sorted(rows)])


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes one line per configuration and epoch."""
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
    """Reads a table that `write_table` wrote."""
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
    """Replays both searches for every seed. The worst figures come first."""
    per_seed: list[dict[str, Any]] = []
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


def _losses(figures: Mapping[str, float], objective: SearchObjective) -> tuple[float, ...]:
    losses = objective.losses(figures)
    assert losses is not None  # the table holds finite figures alone
    return losses


@one_message
def main() -> None:
    """Trains the table's missing rows, replays both searches, and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--space", default="joint", help="file name in tune_spaces/")
    parser.add_argument(
        "--configurations", type=int, metavar="N", default=128, help="rows of the table"
    )
    parser.add_argument("--seeds", type=int, metavar="N", default=3, help="replays of each search")
    parser.add_argument("--replay-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--plain", metavar="SHARDS", help="train without Ray and MLflow on these prepared shards"
    )
    parser.add_argument(
        "--jobs", type=count, metavar="N", default=1, help="with --plain: N trainings at once"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="values that replace the config's"
    )
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
        sys.exit(
            f"{TABLE} has {len(rows)} configurations; {2 * RANDOM_TRIALS} are needed: train more "
            "with --configurations"
        )
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
            return float(abs(one - other) / (domain.high - domain.low))


if __name__ == "__main__":
    main()
