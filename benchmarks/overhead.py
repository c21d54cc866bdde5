"""Measures what Ray costs a training step, against the same loop in plain PyTorch.

    python -m benchmarks.overhead --config configs/quickstart.yaml --stage stage1 --pairs 3 \
        [key=value ...]

The stage is trained alternately by the pipeline and without Ray. The pipeline uses Ray Train with
one worker and reads rows in Ray Data tasks. The plain loop is `train_stage` of
pipelines/chain/plain.py in a fresh process: the same recipe and loop, with rows decoded in one
thread per core. Both give torch one thread per core. The hashes of their rows show whether both
took the same batches. Upstream stages are prepared and trained first.

A step is timed from the end of the previous step, so waiting for data counts. The first steps of
each epoch are warm-up and are not counted. The last line is one JSON object. Each ratio is the
pipeline's time divided by the plain loop's, as the median over pairs: `step_ratio` of median step
times, `mean_ratio` of mean step times, `epoch_ratio` of whole epochs. An epoch is timed from its
first request for data, without holdout figures and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.program import one_message
from mantis_core.training.loop import Session
from pipelines.chain.plain import train_stage
from pipelines.chain.plan import Plan, make_plan
from pipelines.chain.run import run_chain
from pipelines.cluster.machine import usable_cpus
from pipelines.settings.reading import load_settings
from pipelines.stages import train as driver
from pipelines.stages.record import read_result
from pipelines.stages.train import training_of
from pipelines.storage import Store
from pipelines.terminal.console import Console

WARM_UP = 10  # steps at the start of each epoch that are not counted
Clock = list[list[float]]
"""For each epoch its start and the end of each of its steps, in seconds."""


@dataclass(frozen=True)
class Times:
    """Seconds per step: median and mean after the warm-up, and the mean over whole epochs."""

    median: float
    mean: float
    epoch: float


def times_of(clock: Clock, warm_up: int = WARM_UP) -> Times:
    """Computes step times. Raises ValueError if no epoch has a step after the warm-up."""
    steps = [
        after - before
        for epoch in clock
        for before, after in zip(epoch[warm_up:], epoch[warm_up + 1 :], strict=False)
    ]
    if not steps:
        raise ValueError(f"no epoch has more than {warm_up} steps: train on more images")
    whole = sum(epoch[-1] - epoch[0] for epoch in clock) / sum(len(epoch) - 1 for epoch in clock)
    return Times(median(steps), fmean(steps), whole)


def ratios(pairs: Sequence[tuple[Times, Times]]) -> dict[str, float]:
    """Divides the pipeline's times by the plain loop's. Returns medians over pairs."""
    return {
        "step_ratio": median(ray.median / plain.median for ray, plain in pairs),
        "mean_ratio": median(ray.mean / plain.mean for ray, plain in pairs),
        "epoch_ratio": median(ray.epoch / plain.epoch for ray, plain in pairs),
    }


@contextmanager
def clocked() -> Iterator[Clock]:
    """Records when epochs begin and steps end in every Session of this process."""
    epochs: Clock = []
    train_epoch, step = Session.train_epoch, Session.step

    def timed_epoch(self: Session, *arguments: Any) -> dict[str, float]:
        epochs.append([time.perf_counter()])
        return train_epoch(self, *arguments)

    def timed_step(self: Session, batch: Any) -> Any:
        output = step(self, batch)
        epochs[-1].append(time.perf_counter())
        return output

    with patch.multiple(Session, train_epoch=timed_epoch, step=timed_step):
        yield epochs


def timed_worker(config: dict[str, Any]) -> None:
    """Replaces `pipelines.stages.train.start_worker` with the same loop, timed."""
    from pipelines.training.worker import ray_worker

    with clocked() as epochs:
        ray_worker(config)
    Path(config["training"].folder, "clock.json").write_text(json.dumps(epochs))


def in_pipeline(plan: Plan, stage: str) -> tuple[Clock, list[str]]:
    """Trains the stage from scratch in the pipeline. Returns its clock and its row hashes."""
    spec, store = plan.by_name[stage], Store(plan.settings.storage.root)
    store.delete(spec.folder)
    driver.start_worker = timed_worker
    done = run_chain(plan, console=Console(sys.stderr), config_name="overhead", until=spec.kind)
    return store.read_json(f"{spec.folder}/clock.json"), done.stages[stage].rows["sha256"]


def in_plain_pytorch(plan: Plan, stage: str) -> tuple[Clock, list[str]]:
    """Trains the stage from scratch without Ray, in a new process. Returns as `in_pipeline`."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(train_plainly, (plan, stage))


def train_plainly(plan: Plan, stage: str) -> tuple[Clock, list[str]]:
    spec, store = plan.by_name[stage], Store(plan.settings.storage.root)
    store.delete(spec.folder)
    prepared = plan.by_name["prepare"].folder
    training = training_of(spec, plan.by_name, prepared, plan.table, store)
    with clocked() as epochs:
        train_stage(spec, training, usable_cpus())
    return epochs, read_result(store, spec)["rows"]["sha256"]


@one_message
def main() -> int:
    """Trains the upstream stages, then the stage alternately with both loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--stage", default="stage1", choices=("teacher", "stage1", "stage2"))
    parser.add_argument("--pairs", type=int, default=3, help="alternating pairs of trainings")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the config's"
    )
    arguments = parser.parse_intermixed_args()
    own = (
        "cluster.workers=1",
        f"cluster.gpus_per_worker={int(torch.cuda.is_available())}",
        f"cluster.threads_per_worker={usable_cpus()}",
        "tracking.enabled=false",
    )
    with tempfile.TemporaryDirectory(prefix="mantis-overhead-") as folder:
        overrides = [*arguments.overrides, *own, f"storage.root={folder}"]
        plan = make_plan(load_settings(arguments.config, overrides))
        in_pipeline(plan, arguments.stage)  # trains the upstream stages and fills disk caches
        pairs, same_rows = [], True
        for number in range(arguments.pairs):
            ray_clock, ray_rows = in_pipeline(plan, arguments.stage)
            plain_clock, plain_rows = in_plain_pytorch(plan, arguments.stage)
            pairs.append((times_of(ray_clock), times_of(plain_clock)))
            same_rows = same_rows and ray_rows == plain_rows
            shown = [f"{each.median * 1000:.1f} ms" for each in pairs[-1]]
            print(f"pair {number + 1}: pipeline {shown[0]}, plain {shown[1]}", file=sys.stderr)
    measured = [{"pipeline": asdict(ray), "plain": asdict(plain)} for ray, plain in pairs]
    print(json.dumps({**ratios(pairs), "same_rows": same_rows, "pairs": measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
